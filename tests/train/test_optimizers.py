"""A run with each optimizer: it goes on to the last bit, and folded at its start it is the same run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from foldrank.recipes.reading import load_recipe
from foldrank.train.pretrain import pretrain

SHORT: dict[str, Any] = {"train.steps": 6, "train.eval_every": 3, "train.save_every": 3, "train.weight_decay": 0.5}


def losses(out: Path) -> list[float]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.parametrize("optimizer", ["muon", "spectron"])
def test_a_run_goes_on_to_the_last_bit(recipe_file: Path, tmp_path: Path, optimizer: str) -> None:
    recipe = load_recipe(str(recipe_file), {**SHORT, "train.optimizer": optimizer})
    metrics = pretrain(recipe, tmp_path / "run")
    weights = load_file(tmp_path / "run" / "folded" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-6")
    shutil.rmtree(tmp_path / "run" / "folded")
    (tmp_path / "run" / "metrics.json").unlink()
    again = pretrain(recipe, tmp_path / "run", resume=True)
    assert (again.resumed_at_step, again.val_loss) == (3, metrics.val_loss)
    for name, tensor in load_file(tmp_path / "run" / "folded" / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


def test_what_the_iteration_is_in_reaches_the_optimizer(recipe_file: Path, tmp_path: Path) -> None:
    for name in ("float32", "bfloat16"):
        settings = {**SHORT, "train.optimizer": "muon", "train.newton_schulz_dtype": name}
        pretrain(load_recipe(str(recipe_file), settings), tmp_path / name)
    pretrain(load_recipe(str(recipe_file), {**SHORT, "train.optimizer": "muon"}), tmp_path / "default")
    assert losses(tmp_path / "default") == losses(tmp_path / "float32") != losses(tmp_path / "bfloat16")
    assert losses(tmp_path / "bfloat16") == pytest.approx(losses(tmp_path / "float32"), rel=0.02)


@pytest.mark.parametrize("optimizer", ["muon", "spectron"])
def test_a_run_that_is_folded_at_its_start_is_the_same(recipe_file: Path, tmp_path: Path, optimizer: str) -> None:
    for name, at_start in (("residual", False), ("folded", True)):
        settings = {**SHORT, "train.optimizer": optimizer, "train.fold_at_start": at_start}
        pretrain(load_recipe(str(recipe_file), settings), tmp_path / name)
    assert losses(tmp_path / "folded") == pytest.approx(losses(tmp_path / "residual"), rel=1e-5)
    assert losses(tmp_path / "folded")[-1] < losses(tmp_path / "folded")[0]
