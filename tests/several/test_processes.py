"""The same run, shared by two processes, folded at its end or at its start; and once as torchrun starts it."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from foldrank.data.config import DataConfig
from foldrank.data.prepare import prepare
from foldrank.recipes import load_recipe
from foldrank.train.pretrain import pretrain

from .launch import together
from .runs import write_texts

pytestmark = pytest.mark.apart


SETTINGS = {"model.num_layers": 2, "train.eval_every": 4}


def mixture(tiny: Path, folder: Path) -> dict[str, Any]:
    """Drawn by weight, with documents kept apart."""
    text = str(tiny.parent / "text")
    first = prepare(DataConfig(source=text, vocab_size=270, validation_fraction=0.2), folder / "first")
    other = write_texts(folder / "other", "alpha 1")
    second = DataConfig(source=str(other), tokenizer=str(first.folder / "tokenizer"), validation_fraction=0.2)
    prepare(second, folder / "second")
    sources = [{"source": str(folder / "first"), "weight": 1.0}, {"source": str(folder / "second"), "weight": 0.4}]
    return {"data.sources": sources, "train.document_mask": True}


def train(tiny: Path, arms: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What each run says, in a process of several or alone."""
    return [
        pretrain(load_recipe(str(tiny), {**SETTINGS, **arm}), folder / str(number), quiet=True).to_dict()
        for number, arm in enumerate(arms)
    ]


def assert_same(two: Mapping[str, Any], one: Mapping[str, Any]) -> None:
    assert two["tokens_by_source"] == one["tokens_by_source"]
    assert two["val_tokens"] == one["val_tokens"]
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5)
    assert two["val_loss_folded"] == pytest.approx(one["val_loss_folded"], rel=1e-5)
    losses = [[point["train_loss"] for point in run["history"]] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_two_processes_train_and_evaluate_as_one_by_each_optimizer(tiny: Path, tmp_path: Path) -> None:
    arms = [{"train.optimizer": "adamw"}, {"train.optimizer": "muon"}, {"train.optimizer": "spectron"}]
    arms.append({"train.optimizer": "adamw", **mixture(tiny, tmp_path)})
    (alone,) = together(train, tmp_path / "launch-1", tiny, arms, tmp_path / "one", processes=1)
    for shared in together(train, tmp_path / "launch-2", tiny, arms, tmp_path / "two", processes=2):
        for two, one in zip(shared, alone, strict=True):
            assert_same(two, one)
            assert two["folded_layers"] == one["folded_layers"] == 14
    assert len(alone[3]["tokens_by_source"]) == 2


def test_torchrun_starts_the_same_command(tiny: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "train.optimizer": "muon"}
    call = ["pretrain", str(tiny), *(f"--{name}={value}" for name, value in settings.items())]
    call += ["--train.fold_at_start=true"]
    call += ["--train.activation_checkpointing=latents", f"--out={tmp_path / 'two'}", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "foldrank", *call],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)  # one object, although two processes ran
    one = pretrain(load_recipe(str(tiny), settings), tmp_path / "one", quiet=True)
    assert_same(two, one.to_dict())
    assert (one.folded_layers, two["folded_layers"]) == (14, 0)
