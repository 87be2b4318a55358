"""A run folded before its first step gives what the run with the residual gives."""

import json
from pathlib import Path

import pytest

from foldrank.train.pretrain import pretrain
from foldrank.train.recipe import Recipe


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    text = tmp_path_factory.mktemp("text")
    for number in range(40):
        (text / f"{number}.txt").write_text(f"text {number} " + " ".join(str(number * k % 97) for k in range(300)))
    return {
        "model": {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2},
        "low_rank": {"rank": 4, "activation": "silu", "residual": {"alpha": 1.0}},
        "data": {"source": str(text), "vocab_size": 300, "validation_fraction": 0.2},
        "train": {"steps": 40, "batch_size": 4, "sequence_length": 16, "eval_tokens": 500, "weight_decay": 0.3},
    }


def losses(out: Path) -> list[float]:
    return [
        entry["loss"] for line in (out / "log.jsonl").read_text().splitlines() if "loss" in (entry := json.loads(line))
    ]


def test_equals_the_residual_form(settings: dict[str, object], tmp_path: Path) -> None:
    recipe = Recipe.from_dict(settings)
    with_residual = pretrain(recipe, tmp_path / "residual")
    at_start = pretrain(recipe.override({"train.fold_at_start": True}), tmp_path / "start")
    assert at_start["val_loss"] == pytest.approx(with_residual["val_loss"], rel=1e-4)
    assert losses(tmp_path / "start") == pytest.approx(losses(tmp_path / "residual"), rel=1e-4)
    assert with_residual["folded_layers"] == 14
    assert at_start["folded_layers"] == 0
    no_decay = pretrain(recipe.override({"train.weight_decay": 0.0}), tmp_path / "plain")
    assert abs(no_decay["val_loss"] / with_residual["val_loss"] - 1) > 1e-3


def test_needs_a_residual(settings: dict[str, object], tmp_path: Path) -> None:
    recipe = Recipe.from_dict(settings).override({"train.fold_at_start": True, "low_rank.residual": None})
    with pytest.raises(ValueError, match="no residual"):
        pretrain(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
