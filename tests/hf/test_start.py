"""Initial weights: CoLA's deviation for the factors, and everything else equal whatever the method (contract 4)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from foldrank import LowRankConfig, ResidualConfig
from foldrank.core.inventory import low_rank_layers
from foldrank.hf import LowRankLlamaForCausalLM, LowRankLlamaModel

from .models import SHAPE, config

METHODS = {
    "dense": None,
    "low rank": LowRankConfig(rank=3),
    "cola": LowRankConfig(rank=3, activation="silu"),
    "cola-dlr": LowRankConfig(rank=3, activation="silu", residual=ResidualConfig()),
    "cola-dlr, trainable and random": LowRankConfig(
        rank=3, activation="silu", residual=ResidualConfig(trainable=True, expansion="random")
    ),
}


def build(low_rank: LowRankConfig | None, seed: int = 3, tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(seed)
    return LowRankLlamaForCausalLM(config(low_rank, tie_word_embeddings=tied))


def outside_the_layers(model: nn.Module) -> dict[str, Tensor]:
    """Embedding, head and norms."""
    return {name: value for name, value in model.named_parameters() if "_proj" not in name}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("method", METHODS)
def test_one_seed_gives_one_embedding_head_and_norms(method: str, tied: bool) -> None:
    torch.manual_seed(3)
    expected = outside_the_layers(LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied)))
    found = outside_the_layers(build(METHODS[method], tied=tied))
    assert found.keys() == expected.keys()
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= expected.keys()
    assert ("lm_head.weight" in expected) is not tied
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_factors_start_equal_with_and_without_the_residual() -> None:
    plain, residual = build(METHODS["cola"]).state_dict(), build(METHODS["cola-dlr"]).state_dict()
    assert all(torch.equal(plain[name], residual[name]) for name in plain)
    assert all(name.endswith("residual.spec") for name in residual.keys() - plain.keys())


def test_another_seed_gives_other_weights() -> None:
    one, other = (outside_the_layers(build(METHODS["cola-dlr"], seed)) for seed in (3, 4))
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


@contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("by", ["class", "from_config", "init_weights", "base class"])
def test_factors_start_with_the_deviation_of_cola(by: str) -> None:
    shape = config(
        LowRankConfig(rank=24, activation="silu", residual=ResidualConfig(trainable=True)),
        hidden_size=160,
        intermediate_size=200,
        attention_bias=True,
    )
    torch.manual_seed(0)
    with uninitialised_memory_is_nan():
        model = {
            "class": LowRankLlamaForCausalLM,
            "from_config": AutoModelForCausalLM.from_config,
            "init_weights": LowRankLlamaForCausalLM,
            "base class": LowRankLlamaModel,
        }[by](shape)
    if by == "init_weights":
        model.init_weights()
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    layers = low_rank_layers(model)
    assert len(layers) == 14
    for layer in layers.values():
        expected = 24**-0.25 * (layer.in_features + layer.out_features) ** -0.25
        for factor in (layer.down.weight.detach(), layer.up.weight.detach()):
            tolerance = 5 / math.sqrt(2 * factor.numel())  # five standard errors of a deviation
            assert math.isclose(float(factor.std()), expected, rel_tol=tolerance)
            assert abs(float(factor.mean())) < 5 * expected / math.sqrt(factor.numel())
        if layer.up.bias is not None:
            assert 0 < float(layer.up.bias.detach().abs().max()) <= layer.out_features**-0.5
        assert layer.residual is not None
        assert layer.residual.alpha.tolist() == [1.0]
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    assert math.isclose(float(embedding.weight.detach().std()), 0.02, rel_tol=0.05)


def test_a_model_on_the_meta_device_has_the_same_shapes() -> None:
    real = build(METHODS["cola-dlr"])
    with torch.device("meta"):
        planned = build(METHODS["cola-dlr"])
    assert all(parameter.is_meta for parameter in planned.parameters())
    shapes = {name: value.shape for name, value in real.state_dict().items()}
    assert {name: value.shape for name, value in planned.state_dict().items()} == shapes
