"""The same command under torchrun: the same run, shared by two processes."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


@pytest.mark.parametrize("kept", ["null", "latents"])
def test_two_processes_train_and_evaluate_as_one(tmp_path: Path, kept: str) -> None:
    """Also where the two keep less for the backward pass and the one does not."""
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
        },
    }
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    command = ["-m", "foldrank.cli", "pretrain", str(recipe), "--json", "--out"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    results = []
    options = ["--train.activation_checkpointing", kept]
    for name, launcher, more in (("one", [], []), ("two", launch, options)):
        done = subprocess.run(
            [sys.executable, *launcher, *command, str(tmp_path / name), *more],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))  # one object, although two processes ran
    one, two = results
    assert two["val_tokens"] == one["val_tokens"]
    for key in ("val_loss", "val_loss_folded"):
        assert two[key] == pytest.approx(one[key], rel=1e-5)
    losses = [[row["train_loss"] for row in result["history"]] for result in results]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
