"""Schedules without a fixed end: runs that go on, and runs that branch off another, to the last bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_scheduler

from foldrank.cli import main
from foldrank.recipes import Recipe, load_recipe
from foldrank.train.metrics import RunMetrics
from foldrank.train.pretrain import pretrain
from foldrank.train.run_folder import RunFolder
from foldrank.train.schedule import stable_until, sum_of_rates
from foldrank.train.trainer import training_arguments

from ..small_runs import SMALL_MODEL

WSD: dict[str, Any] = {
    **SMALL_MODEL,
    "train.schedule": "wsd",
    "train.warmup_steps": 1,
    "train.decay_ratio": 0.25,
    "train.eval_every": 2,
    "train.save_every": 2,
    "train.keep_checkpoints": 1,
}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "unfolded" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def log(out: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "learning_rate", "epoch", "eval_loss", "eval_perplexity", "train_loss")
    return [{name: entry[name] for name in kept if name in entry} for entry in entries if "event" not in entry]


@pytest.fixture(scope="module")
def recipes(recipe_file: Path) -> Any:
    return lambda **more: load_recipe(
        str(recipe_file), {**WSD, **{f"train.{name}": value for name, value in more.items()}}
    )


@pytest.fixture(scope="module")
def long(recipes: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of sixteen steps of which twelve are stable; it keeps the checkpoints of 12 and of 16."""
    out = tmp_path_factory.mktemp("long") / "run"
    pretrain(recipes(steps=16), out, quiet=True)
    return out


@pytest.fixture(scope="module")
def planned(recipes: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps, fifteen of them stable."""
    out = tmp_path_factory.mktemp("planned") / "run"
    pretrain(recipes(steps=20), out, quiet=True)
    return out


def test_the_step_before_the_decay_is_kept(long: Path) -> None:
    assert sorted(path.name for path in (long / "checkpoints").iterdir()) == ["checkpoint-12", "checkpoint-16"]


def test_a_branch_is_the_run_that_was_planned_to_its_length(
    recipes: Any, long: Path, planned: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in long.rglob("*") if path.is_file()}
    metrics = pretrain(recipes(steps=20), tmp_path / "branch", branch_from=long, quiet=True)
    assert same(tmp_path / "branch", planned)
    expected = RunMetrics.read(planned / "metrics.json")
    assert (metrics.val_loss, metrics.val_loss_folded) == (expected.val_loss, expected.val_loss_folded)
    assert [point.val_loss for point in metrics.history] == [point.val_loss for point in expected.history]
    assert log(tmp_path / "branch")[-3:-1] == log(planned)[-3:-1]
    run_id = RunFolder(long).read_config().id
    assert metrics.lineage == (
        f"branched off the run {run_id} after step 12: planned for 16 steps (wsd), from step 12 on for 20 (wsd)",
    )
    assert RunFolder(tmp_path / "branch").read_config().lineage == metrics.lineage
    assert before == {path: path.read_bytes() for path in long.rglob("*") if path.is_file()}, (
        "the other run is as it was"
    )


def test_a_finished_run_goes_on_in_its_folder(recipes: Any, long: Path, planned: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(long, out)
    metrics = pretrain(recipes(steps=20), out, resume=True, quiet=True)
    assert same(out, planned)
    assert metrics.lineage == ("planned for 16 steps (wsd), from step 12 on for 20 (wsd)",)
    assert (metrics.steps, metrics.resumed_at_step) == (20, 12)
    with pytest.raises(ValueError, match="is finished: nothing is left to do"):
        pretrain(recipes(steps=20), out, resume=True, quiet=True)


def test_a_constant_run_goes_on_and_decays_as_a_branch(recipes: Any, tmp_path: Path) -> None:
    whole = pretrain(recipes(steps=8, schedule="constant"), tmp_path / "whole", quiet=True)
    pretrain(recipes(steps=4, schedule="constant"), tmp_path / "run", quiet=True)
    longer = pretrain(recipes(steps=8, schedule="constant"), tmp_path / "run", resume=True, quiet=True)
    assert longer.val_loss == whole.val_loss
    assert same(tmp_path / "run", tmp_path / "whole")
    decayed = pretrain(
        recipes(steps=12, schedule="wsd", decay_ratio=0.3),
        tmp_path / "decayed",
        branch_from=tmp_path / "run",
        quiet=True,
    )
    assert decayed.resumed_at_step == 8
    rates = [entry["learning_rate"] for entry in log(tmp_path / "decayed") if "learning_rate" in entry]
    assert rates[-1] < rates[-2] < rates[-3]


def test_a_branch_that_is_interrupted_goes_on(recipes: Any, long: Path, planned: Path, tmp_path: Path) -> None:
    out = tmp_path / "branch"
    pretrain(recipes(steps=20), out, branch_from=long / "checkpoints" / "checkpoint-12", quiet=True)
    shutil.rmtree(out / "folded")
    (out / "metrics.json").unlink()
    pretrain(recipes(steps=20), out, resume=True, quiet=True)
    assert same(out, planned)
    shutil.rmtree(out / "checkpoints")
    (out / "metrics.json").unlink()
    with pytest.raises(ValueError, match="ended before its first checkpoint, and does not start by itself"):
        pretrain(recipes(steps=20), out, resume=True, quiet=True)


@pytest.mark.parametrize(
    ("settings", "how", "message"),
    [
        ({"steps": 20, "schedule": "cosine"}, "branch", "with train.schedule cosine every learning rate depends on"),
        ({"steps": 20, "learning_rate": 0.1}, "branch", "was started with other settings: train.learning_rate was"),
        ({"steps": 20, "warmup_steps": None}, "branch", "has warmed up for 1 steps: give that number as --train.warm"),
        ({"steps": 12}, "branch", "is of step 9 or before, after which the schedules part"),
        ({"steps": 12}, "checkpoint", "is of step 16, and the two schedules part after 9"),
        ({"steps": 20}, "nowhere", "is no run and lies in none: --branch-from takes a run's folder or a checkpoint"),
        ({"steps": 20}, "itself", "needs a folder of its own"),
        ({"steps": 20}, "both", "--resume goes on with the run in a folder, --branch-from begins one"),
        ({"steps": 20, "schedule": "cosine"}, "resume", "with train.schedule cosine every learning rate depends on"),
        ({"steps": 12}, "resume", "is of step 9 or before, after which the schedules part"),
    ],
)
def test_what_cannot_go_on_is_one_line_and_leaves_nothing(
    recipes: Any, long: Path, tmp_path: Path, settings: dict[str, Any], how: str, message: str
) -> None:
    before = sorted(long.rglob("*"))
    source = {"checkpoint": long / "checkpoints" / "checkpoint-16", "nowhere": tmp_path / "nowhere"}.get(how, long)
    out = long if how in ("itself", "resume", "both") else tmp_path / "out"
    branch_from, resume = (None if how == "resume" else source), how in ("resume", "both")
    with pytest.raises(ValueError, match=message):
        pretrain(
            recipes(**settings), out, branch_from=branch_from, resume=resume, overwrite=how == "itself", quiet=True
        )
    assert not (tmp_path / "out").exists()
    assert sorted(long.rglob("*")) == before


def test_the_command_branches(recipe_file: Path, long: Path, tmp_path: Path, capsys: Any) -> None:
    options = [part for name, value in {**WSD, "train.steps": 14}.items() for part in (f"--{name}", str(value))]
    checkpoint = long / "checkpoints" / "checkpoint-12"
    command = ["pretrain", str(recipe_file), *options, "--out", str(tmp_path / "branch"), "--branch-from"]
    assert main([*command, str(checkpoint)]) == 2
    assert "checkpoint-12 is of step 12, and the two schedules part after 10" in capsys.readouterr().err
    options[options.index("--train.decay_ratio") + 1] = "0.1"
    command = ["pretrain", str(recipe_file), *options, "--out", str(tmp_path / "branch"), "--branch-from"]
    assert main([*command, str(checkpoint)]) == 0
    assert "branched off the run" in capsys.readouterr().out


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_rates_are_those_of_the_scheduler(schedule: str, tmp_path: Path) -> None:
    recipe = Recipe().override({"train.steps": 400, "train.schedule": schedule, "train.min_learning_rate_ratio": 0.05})
    arguments = training_arguments(recipe, tmp_path)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.train.learning_rate)
    settings: Any = arguments.lr_scheduler_kwargs
    scheduler = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=int(arguments.warmup_steps),
        num_training_steps=400,
        scheduler_specific_kwargs=settings,
    )
    rates = []
    for _ in range(400):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert sum_of_rates(recipe.train) == pytest.approx(sum(rates), rel=0.01)
    peak = [step for step, rate in enumerate(rates, 1) if rate == recipe.train.learning_rate]
    if schedule != "cosine":
        # The rate of step n + 1 is the first that knows the end.
        assert peak[-1] == {"wsd": stable_until(recipe.train) + 1, "constant": 400}[schedule]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 301}, "warmup_steps must be at most steps 300, got 301"),
        ({"schedule": "wsd", "decay_ratio": 0.95}, "warm-up and decay of wsd take 1.05 of the steps"),
        ({"schedule": "wsd", "warmup_steps": 290}, "lower decay_ratio 0.2, or warm up for less"),
        ({"schedule": "linear"}, "train.schedule: Input should be 'cosine', 'wsd' or 'constant', got 'linear'"),
        ({"decay_ratio": 0}, "decay_ratio must"),
    ],
)
def test_schedules_that_are_none(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe().override({f"train.{name}": value for name, value in settings.items()})
