"""The same run, shared by two processes, folded at its end or at its start; and once as torchrun starts it."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from foldrank.data.config import DataConfig
from foldrank.data.prepare import prepare
from foldrank.recipes import load_recipe
from foldrank.train.pretrain import pretrain

from .launch import together

pytestmark = pytest.mark.apart


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    settings = {
        "base": "demo",
        "sample_tokens": 4,
        "model": {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2},
        "low_rank": {"rank": 4},
        "data": {"source": str(texts(folder / "text", "alpha beta gamma delta = 1")), "vocab_size": 270},
        "train": {
            "steps": 8,
            "batch_size": 4,
            "sequence_length": 16,
            "eval_every": 4,
            "save_every": 4,
            "eval_tokens": 300,
            "weight_decay": 3.0,  # strong, so that one without its anchor would show in these few steps
        },
    }
    settings["data"]["validation_fraction"] = 0.2
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def texts(folder: Path, words: str) -> Path:
    folder.mkdir()
    draw = random.Random(0)
    for number in range(30):
        (folder / f"{number}.txt").write_text(" ".join(draw.choices(words.split(), k=400)))
    return folder


def mixture(recipe: Path, folder: Path) -> dict[str, Any]:
    """Drawn by weight, with documents kept apart."""
    text = str(recipe.parent / "text")
    first = prepare(DataConfig(source=text, vocab_size=270, validation_fraction=0.2), folder / "first")
    other = texts(folder / "other", "alpha 1")
    second = DataConfig(source=str(other), tokenizer=str(first.folder / "tokenizer"), validation_fraction=0.2)
    prepare(second, folder / "second")
    sources = [{"source": str(folder / "first"), "weight": 1.0}, {"source": str(folder / "second"), "weight": 0.4}]
    return {"data.sources": sources, "train.document_mask": True}


def train(recipe: Path, arms: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What each run says, in a process of several or alone."""
    return [
        pretrain(load_recipe(str(recipe), arm), folder / str(number), quiet=True).to_dict()
        for number, arm in enumerate(arms)
    ]


def assert_same(two: Mapping[str, Any], one: Mapping[str, Any]) -> None:
    assert two["tokens_by_source"] == one["tokens_by_source"]
    assert two["val_tokens"] == one["val_tokens"]
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5)
    assert two["val_loss_folded"] == pytest.approx(one["val_loss_folded"], rel=1e-5)
    losses = [[point["train_loss"] for point in run["history"]] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_two_processes_train_and_evaluate_as_one_by_each_optimizer(recipe: Path, tmp_path: Path) -> None:
    arms = [{"train.optimizer": "adamw"}, {"train.optimizer": "muon"}, {"train.optimizer": "spectron"}]
    arms.append({"train.optimizer": "adamw", **mixture(recipe, tmp_path)})
    (alone,) = together(train, tmp_path / "launch-1", recipe, arms, tmp_path / "one", processes=1)
    for shared in together(train, tmp_path / "launch-2", recipe, arms, tmp_path / "two", processes=2):
        for two, one in zip(shared, alone, strict=True):
            assert_same(two, one)
            assert two["folded_layers"] == one["folded_layers"] == 14
    assert len(alone[3]["tokens_by_source"]) == 2


def test_torchrun_starts_the_same_command(recipe: Path, tmp_path: Path) -> None:
    call = ["pretrain", str(recipe), "--train.optimizer=muon", "--train.fold_at_start=true"]
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
    asked = load_recipe(str(recipe), {"train.optimizer": "muon", "train.device": "cpu"})
    one = pretrain(asked, tmp_path / "one", quiet=True)
    assert_same(two, one.to_dict())
    assert (one.folded_layers, two["folded_layers"]) == (14, 0)
