"""What a residual does to the first batch is said, and done to nothing."""

from pathlib import Path

import pytest
import torch

from foldrank import fold_
from foldrank.data.config import SequenceFormat
from foldrank.data.prepare import prepared
from foldrank.recipes.reading import load_recipe
from foldrank.train.evaluate import evaluate_loss, first
from foldrank.train.model import build_model
from foldrank.train.perturbation import start_losses
from foldrank.train.pretrain import pretrain


def test_losses_with_and_without(recipe_file: Path) -> None:
    recipe = load_recipe(str(recipe_file), {"low_rank.residual.alpha": 4.0})
    data = prepared(recipe.data)
    batch = first(data.training(SequenceFormat(length=32), seed=0, num_sequences=8), 4)
    model = build_model(recipe, data.manifest.vocab_size)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with_residual, without = start_losses(model, batch, batch_size=4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    plain = build_model(recipe.override({"low_rank.residual": None}), data.manifest.vocab_size)
    assert without == pytest.approx(evaluate_loss(plain, batch).loss, rel=1e-6)
    assert start_losses(plain, batch, batch_size=4) == (pytest.approx(without, rel=1e-6), None)
    fold_(model)
    assert with_residual == pytest.approx(evaluate_loss(model, batch).loss, rel=1e-6)
    assert abs(with_residual - without) > 1e-4  # pyright: ignore[reportOperatorIssue]


@pytest.mark.parametrize("at_start", [False, True])
def test_a_run_says_them(recipe_file: Path, tmp_path: Path, at_start: bool) -> None:
    settings = {"train.steps": 2, "train.eval_every": 2, "train.fold_at_start": at_start}
    metrics = pretrain(load_recipe(str(recipe_file), settings), tmp_path / "run", quiet=True)
    assert metrics.start_loss is not None
    assert metrics.start_loss_without_residual is not None
    assert metrics.start_loss == pytest.approx(metrics.history[0].train_loss, rel=0.1)
