"""A gradient that is not finite: the run ends at the step, or leaves it out; nothing of it gets into the weights."""

import json
import math
from collections.abc import Collection
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import foldrank.train.pretrain as module
from foldrank.recipes import load_recipe
from foldrank.recipes.schema import Recipe
from foldrank.runs.page import document
from foldrank.runs.run import read_run
from foldrank.train.pretrain import pretrain


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe(
        str(recipe_file),
        {"train.steps": 10, "train.eval_every": 5, "train.save_every": 1, "train.keep_checkpoints": 20},
    )


def break_gradients(monkeypatch: pytest.MonkeyPatch, steps: Collection[int], factor: float = math.inf) -> None:
    """Lets the backward passes of these steps give what is not finite."""
    real = module.build_model

    def build(*args: Any, **kwargs: Any) -> Any:
        model, passes = real(*args, **kwargs), count(1)
        weight = next(parameter for parameter in model.parameters() if parameter.dim() == 2)
        weight.register_hook(lambda gradient: gradient * factor if next(passes) in steps else gradient)
        return model

    monkeypatch.setattr(module, "build_model", build)


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"checkpoint-{step}" / "model.safetensors")


def notes(out: Path) -> list[tuple[int, str]]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["note"]) for entry in entries if "note" in entry]


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_the_run_ends_and_names_step_checkpoint_and_cure(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    undisturbed = pretrain(recipe, tmp_path / "whole", quiet=True)
    out = tmp_path / "run"
    with monkeypatch.context() as broken:
        break_gradients(broken, {5}, factor)
        with pytest.raises(ValueError, match=r"the gradient norm of step 5 is (nan|inf)") as refused:
            pretrain(recipe, out, quiet=True)
    for words in ("The last good checkpoint is checkpoint-4", "train.learning_rate", "train.skip_nonfinite"):
        assert words in str(refused.value)
    # The log and the page say so, and the run goes on from there as if nothing had been.
    run = read_run(out)
    assert (run.state, run.log.step) == ("stopped", 4)
    assert "the gradient norm of step 5" in str(document([run]).banner)
    assert pretrain(recipe, out, resume=True, quiet=True).val_loss == undisturbed.val_loss


def test_a_run_that_ended_goes_on_with_the_cure(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, cured = tmp_path / "run", recipe.override({"train.skip_nonfinite": 1})
    with monkeypatch.context() as broken:
        break_gradients(broken, {5})
        with pytest.raises(ValueError, match="step 5"):
            pretrain(recipe, out, quiet=True)
    break_gradients(monkeypatch, {1})  # of this process: step 5 once more
    assert pretrain(cured, out, resume=True, quiet=True).resumed_at_step == 4
    assert [step for step, _ in notes(out)] == [5]
    assert read_run(out).settings["train"]["skip_nonfinite"] == 1
    assert not read_run(out).about["lineage"]


def test_steps_are_left_out_and_leave_no_trace(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_gradients(monkeypatch, {5, 6, 8})
    out = tmp_path / "run"
    metrics = pretrain(recipe.override({"train.skip_nonfinite": 2}), out, quiet=True)
    assert math.isfinite(metrics.val_loss_folded)
    left_out = "1 step was left out, as the gradient was not finite"
    assert notes(out) == [(5, left_out), (6, left_out), (8, left_out)]
    saved = {step: weights(out, step) for step in range(4, 10)}
    for name, before in saved[4].items():
        assert torch.equal(before, saved[5][name])
        assert torch.equal(before, saved[6][name])
        assert torch.equal(saved[7][name], saved[8][name])
    assert any(not torch.equal(before, saved[7][name]) for name, before in saved[6].items())
    optimizer = [
        torch.load(out / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)["state"]
        for step in (4, 5)
    ]
    for one, other in zip(*(state.values() for state in optimizer), strict=True):
        assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)


def test_more_in_a_row_than_allowed_end_the_run(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_gradients(monkeypatch, {3, 5, 6, 7})
    with pytest.raises(ValueError, match=r"the gradient norm of step 7 is .*The last good checkpoint is checkpoint-6"):
        pretrain(recipe.override({"train.skip_nonfinite": 2}), tmp_path / "run", quiet=True)
