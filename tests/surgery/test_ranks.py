"""A budget of parameters in place of a rank."""

from fractions import Fraction

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from foldrank import LowRankConfig, ResidualConfig, factorize_, fold_
from foldrank.core.inventory import count_parameters
from foldrank.surgery.ranks import solve_ranks

from ..core.models import TinyLM, assert_unchanged, snapshot

BLOCK = {"q": (64, 64), "k": (64, 16), "up": (64, 171)}
SHAPES = {f"{i}.{name}": shape for i in range(3) for name, shape in BLOCK.items()}
DENSE = sum(a * b for a, b in SHAPES.values())


def cost(ranks: dict[str, int]) -> int:
    return sum(rank * sum(SHAPES[name]) for name, rank in ranks.items())


@pytest.mark.parametrize("kept", [0, 1000])
@pytest.mark.parametrize("percent", [10, 25, 33, 50, 60, 80])
def test_ranks_share_one_fraction_and_use_the_budget_up(percent: int, kept: int) -> None:
    total = DENSE + kept
    ranks = solve_ranks(SHAPES, budget=percent / 100, total=total, other_params=kept)
    left = Fraction(percent, 100) * total - kept - cost(ranks)
    assert 0 <= left < max(sum(shape) for shape in SHAPES.values())
    highest = {name: a * b // (a + b) for name, (a, b) in SHAPES.items()}
    # Some fraction lies, for each layer that is not at its bounds, within one rank of what the layer got.
    free = {name: rank for name, rank in ranks.items() if 1 < rank < highest[name]}
    assert free
    low = max(Fraction(rank - 1, min(SHAPES[name])) for name, rank in free.items())
    high = min(Fraction(rank + 1, min(SHAPES[name])) for name, rank in free.items())
    assert low < high
    assert all(1 <= rank <= highest[name] for name, rank in ranks.items())
    assert all(abs(ranks[f"0.{name}"] - ranks[f"2.{name}"]) <= 1 for name in ("q", "k", "up"))


def test_what_rounding_leaves_goes_to_the_first_of_equals() -> None:
    shapes = dict.fromkeys("abcd", (8, 8))
    assert solve_ranks(shapes, budget=0.5, total=256, other_params=0) == {"a": 2, "b": 2, "c": 2, "d": 2}
    assert solve_ranks(shapes, budget=0.65, total=256, other_params=0) == {"a": 3, "b": 3, "c": 2, "d": 2}


def test_more_budget_never_means_less_rank_in_total() -> None:
    costs = [cost(solve_ranks(SHAPES, budget=percent / 100, total=DENSE, other_params=0)) for percent in range(5, 100)]
    assert costs == sorted(costs)


def test_no_layer_gets_more_than_it_had() -> None:
    ranks = solve_ranks(SHAPES, budget=0.999, total=DENSE, other_params=0)
    assert all(rank * sum(SHAPES[name]) <= SHAPES[name][0] * SHAPES[name][1] for name, rank in ranks.items())
    assert cost(ranks) > 0.98 * DENSE


def llama(tie: bool) -> nn.Module:
    """The published 60M shape; on the meta device it costs nothing."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("budget", [0.75, 0.5])
@pytest.mark.parametrize(
    "build",
    [
        lambda: llama(tie=True),
        lambda: GPT2LMHeadModel(GPT2Config()),
        lambda: nn.Sequential(*(nn.Linear(256, 256) for _ in range(4))),
        lambda: TinyLM(vocabulary=16, width=128, hidden=340),
    ],
    ids=["llama", "gpt2", "mlp", "tiny"],
)
def test_a_budget_is_met_within_one_percent(build: type[nn.Module], budget: float) -> None:
    with torch.device("meta"):
        model = build()
    before = count_parameters(model)
    config = LowRankConfig(budget=budget, activation="silu", residual=ResidualConfig())
    report = factorize_(model, config)
    assert report.params_after == count_parameters(model)
    assert 0.99 * budget <= report.params_after / before <= budget


def test_the_budget_counts_the_folded_model() -> None:
    model = TinyLM(width=64, hidden=96)
    before = count_parameters(model)
    factorize_(model, LowRankConfig(budget=0.5, residual=ResidualConfig(trainable=True)))
    fold_(model)
    assert 0.495 <= count_parameters(model) / before <= 0.5


def test_a_budget_goes_with_targets_and_dense_blocks() -> None:
    model = TinyLM(width=64, hidden=96)
    before = count_parameters(model)
    report = factorize_(model, LowRankConfig(budget=0.8, targets=[r".*_proj"], exclude=["k_proj"], dense_first=1))
    assert {layer.name.split(".")[1] for layer in report.converted} == {"1"}
    assert 0.792 <= count_parameters(model) / before <= 0.8


def test_an_impossible_budget_is_refused_with_what_stands_in_its_way() -> None:
    with torch.device("meta"):
        model = llama(tie=False)
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"^budget 0\.5: of 58,.* 32,.* remain at rank 1, because 32,.* lie outside"):
        factorize_(model, LowRankConfig(budget=0.5))
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_a_refused_budget_leaves_the_weights_alone() -> None:
    model = TinyLM()
    before = snapshot(model)
    with pytest.raises(ValueError, match="remain at rank 1"):
        factorize_(model, LowRankConfig(budget=0.1))
    assert_unchanged(model, before)
