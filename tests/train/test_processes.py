"""The same command under torchrun: the same run, shared by two processes, folded at its end or at its start."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from foldrank.data.config import DataConfig
from foldrank.data.prepare import prepare
from foldrank.recipes import load_recipe
from foldrank.train.pretrain import pretrain

pytestmark = pytest.mark.apart

SEVERAL = """
import json, os, pathlib, sys

from foldrank.cli import main

for arguments in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    assert main(arguments) == 0
    if os.environ["RANK"] == "0":
        print("\f", flush=True)
"""
"""Runs commands one after the other, each as the command line would."""


def test_two_processes_train_and_evaluate_as_one_by_each_optimizer(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    words = random.Random(0)
    for number in range(30):
        (text / f"{number}.txt").write_text(
            " ".join(words.choices(["alpha", "beta", "gamma", "delta", "=", "1"], k=400))
        )
    settings = {
        "base": "demo",
        "sample_tokens": 4,
        "model": {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2},
        "low_rank": {"rank": 4},
        "data": {"source": str(text), "vocab_size": 270, "validation_fraction": 0.2},
        "train": {
            "steps": 8,
            "batch_size": 4,
            "sequence_length": 16,
            "eval_every": 4,
            "save_every": 4,
            "weight_decay": 3.0,  # strong, so that one without its anchor would show in these few steps
        },
    }
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    otherwise = ["--train.fold_at_start", "true", "--train.activation_checkpointing", "latents"]
    # A mixture, drawn by weight, and documents kept apart.
    first = prepare(DataConfig(source=str(text), vocab_size=270, validation_fraction=0.2), tmp_path / "first")
    other = tmp_path / "other"
    other.mkdir()
    for number in range(30):
        (other / f"{number}.txt").write_text(" ".join(words.choices(["alpha", "1"], k=60)))
    second = DataConfig(source=str(other), tokenizer=str(first.folder / "tokenizer"), validation_fraction=0.2)
    prepare(second, tmp_path / "second")
    sources = [{"source": str(tmp_path / "first"), "weight": 1.0}, {"source": str(tmp_path / "second"), "weight": 0.4}]
    mixed = ["--data.sources", json.dumps(sources), "--train.document_mask", "true"]
    arms = [("adamw", []), ("muon", []), ("muon", otherwise), ("spectron", []), ("adamw", mixed)]
    # One launch for all: most of the time of a launch is imports.
    commands = tmp_path / "commands.json"
    calls = [
        ["pretrain", str(recipe), f"--train.optimizer={optimizer}", *options, f"--out={tmp_path / f'two-{number}'}"]
        for number, (optimizer, options) in enumerate(arms)
    ]
    commands.write_text(json.dumps([[*call, "--json"] for call in calls]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    program = tmp_path / "several.py"
    program.write_text(SEVERAL)
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(program), str(commands)], capture_output=True, text=True, check=False, env=hidden
    )
    assert done.returncode == 0, done.stderr
    printed = [json.loads(text) for text in done.stdout.split("\f") if text.strip()]
    assert len(printed) == len(arms)  # one object each, although two processes ran
    for number, ((optimizer, options), two) in enumerate(zip(arms, printed, strict=True)):
        mixture = {"data.sources": sources, "train.document_mask": True} if options is mixed else {}
        asked = load_recipe(str(recipe), {"train.optimizer": optimizer, "train.device": "cpu", **mixture})
        one = pretrain(asked, tmp_path / f"one-{number}", quiet=True)
        assert two["tokens_by_source"] == one.tokens_by_source
        assert two["val_tokens"] == one.val_tokens
        assert two["val_loss"] == pytest.approx(one.val_loss, rel=1e-5)
        assert two["val_loss_folded"] == pytest.approx(one.val_loss_folded, rel=1e-5)
        losses = [point.train_loss for point in one.history]
        assert [row["train_loss"] for row in two["history"]] == pytest.approx(losses, rel=1e-4)
        assert two["folded_layers"] == (0 if options is otherwise else 14)
