"""What an optimizer costs is what PyTorch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from foldrank.optim import factor_optimizer
from foldrank.recipes import RECIPES
from foldrank.train.model import build_model, check_recipe, meta_model
from foldrank.train.optimizer_cost import optimizer_bytes, optimizer_flops

from ..small_runs import SMALL_MODEL

SMALL = RECIPES["demo"].override({**SMALL_MODEL, "model.vocab_size": 61})


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "spectron"])
@pytest.mark.parametrize("settings", [{}, {"low_rank": None}, {"low_rank.residual.trainable": True}])
def test_bytes_and_flops_are_those_of_a_step(optimizer: str, settings: dict[str, object]) -> None:
    recipe = SMALL.override({"train.optimizer": optimizer, **settings})
    if (optimizer, recipe.low_rank) == ("spectron", None):
        with pytest.raises(ValueError, match="the model has none"):
            check_recipe(recipe)
        return
    model = build_model(recipe, 61)
    trained = factor_optimizer(model, optimizer, lr=0.1)
    ids = torch.arange(16)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    with FlopCounterMode(display=False) as counter:
        trained.step()
    assert counter.get_total_flops() == optimizer_flops(meta_model(recipe, 61), recipe.train)
    kept = sum(tensor.nbytes for state in trained.state.values() for tensor in state.values())
    assert optimizer_bytes(meta_model(recipe, 61), recipe.train) == kept
    assert optimizer_bytes(model, recipe.train, shards=2) < kept
