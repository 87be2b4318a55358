"""The same command under torchrun: the same run, shared by two processes, folded at its end or at its start."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


def test_two_processes_train_and_evaluate_as_one(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    words = random.Random(0)
    for number in range(30):
        (text / f"{number}.txt").write_text(
            " ".join(words.choices(["alpha", "beta", "gamma", "delta", "=", "1"], k=400))
        )
    settings = {
        "base": "demo",
        "model": {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2},
        "low_rank": {"rank": 4},
        "data": {"source": str(text), "vocab_size": 270, "validation_fraction": 0.2},
        "train": {
            "steps": 8,
            "batch_size": 4,
            "sequence_length": 16,
            "eval_every": 4,
            "save_every": 4,
            "device": "cpu",
            "weight_decay": 3.0,  # strong, so that one without its anchor would show in these few steps
        },
    }
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    command = ["-m", "foldrank.cli", "pretrain", str(recipe), "--json", "--out"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    results = []
    otherwise = ["--train.fold_at_start", "true", "--train.activation_checkpointing", "latents"]
    for name, launcher, options in (("one", [], []), ("two", launch, []), ("two otherwise", launch, otherwise)):
        done = subprocess.run(
            [sys.executable, *launcher, *command, str(tmp_path / name), *options],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))  # one object, although two processes ran
    one, *others = results
    losses = [[row["train_loss"] for row in result["history"]] for result in results]
    for other, its_losses in zip(others, losses[1:], strict=True):
        assert other["val_tokens"] == one["val_tokens"]
        for key in ("val_loss", "val_loss_folded"):
            assert other[key] == pytest.approx(one[key], rel=1e-5)
        assert its_losses == pytest.approx(losses[0], rel=1e-4)
    assert [result["folded_layers"] for result in results] == [14, 14, 0]
