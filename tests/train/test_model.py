"""The model of a recipe: every shipped one can be built, and methods start equal where they can (contract 4)."""

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from foldrank import LowRankConfig, ResidualConfig
from foldrank.recipes import RECIPES
from foldrank.recipes.model_config import ModelConfig
from foldrank.recipes.schema import Recipe
from foldrank.surgery.factorize import count_parameters, low_rank_layers
from foldrank.train.model import build_model, dense_parameters, meta_model

SMALL = Recipe(model=ModelConfig(hidden_size=32, intermediate_size=50, num_layers=2, num_heads=2))
METHODS = {
    "dense": None,
    "low rank": LowRankConfig(rank=7),
    "cola": LowRankConfig(rank=7, activation="silu"),
    "cola-dlr": LowRankConfig(rank=7, activation="silu", residual=ResidualConfig()),
}


# tests/recipes builds all of them.
@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith(("demo", "tiny", "llama-60m"))])
def test_a_recipe_builds_the_class_of_its_method(name: str) -> None:
    recipe = RECIPES[name]
    model = meta_model(recipe, recipe.data.vocab_size)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert (type(model) is LlamaForCausalLM) == (recipe.low_rank is None)
    assert len(low_rank_layers(model)) == (
        0 if recipe.low_rank is None else 7 * (recipe.model.num_layers - recipe.low_rank.dense_first)
    )
    dense = dense_parameters(recipe, recipe.data.vocab_size)
    assert count_parameters(model) < dense or recipe.low_rank is None


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_dense_equivalent_is_counted_without_being_built(tied: bool) -> None:
    settings = {"model.tie_embeddings": tied}
    dense = build_model(SMALL.override(settings), 300)
    low_rank = SMALL.override({**settings, "low_rank.rank": 7})
    assert dense_parameters(low_rank, 300) == count_parameters(dense)


def outside_the_layers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if "_proj" not in name}


@pytest.mark.parametrize("method", METHODS)
def test_methods_of_one_seed_start_equal(method: str) -> None:
    def start(seed: int, low_rank: LowRankConfig | None) -> dict[str, Tensor]:
        recipe = SMALL.override({"seed": seed, "low_rank": None if low_rank is None else low_rank.to_dict()})
        torch.manual_seed(99)  # what was drawn before must not matter
        return outside_the_layers(build_model(recipe, 300))

    dense, found = start(5, None), start(5, METHODS[method])
    assert found.keys() == dense.keys()
    assert all(torch.equal(found[name], dense[name]) for name in dense)
    assert not torch.equal(start(6, METHODS[method])["lm_head.weight"], dense["lm_head.weight"])


def test_the_model_is_as_the_recipe_says() -> None:
    recipe = SMALL.override({"low_rank.rank": 7, "low_rank.residual.alpha": 0.5, "model.tie_embeddings": True})
    model = build_model(recipe, 300, bos_token_id=1, eos_token_id=2)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.vocab_size) == (1, 2, 300)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    layers = low_rank_layers(model)
    assert {layer.rank for layer in layers.values()} == {7}
    assert all(layer.residual is not None and layer.residual.config.alpha == 0.5 for layer in layers.values())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding)
    assert isinstance(head, nn.Linear)
    assert head.weight is embedding.weight


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"low_rank.rank": 33}, "rank 33 is above the full rank 32 of model.layers.0.self_attn.q_proj"),
        ({"low_rank.rank": {"q_prj": 4}}, "'q_prj' matches no linear layer here; the nearest names are .*q_proj"),
        ({"low_rank.rank": 4, "low_rank.targets": ["nothing"]}, "targets: 'nothing' matches no linear layer"),
        ({"low_rank.rank": 4, "low_rank.residual.scope": ["nothing"]}, "residual.scope: 'nothing' matches no"),
    ],
)
def test_settings_that_do_not_fit_the_architecture(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        build_model(SMALL.override(settings), 300)
