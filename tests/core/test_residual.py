import math
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck

from foldrank.core.config import EXPANSIONS, Expansion, ResidualConfig
from foldrank.core.drawn import random_index
from foldrank.core.functional import (
    effective_weight,
    expansion_index,
    literal_residual,
    residual_coefficient,
)
from foldrank.core.residual import DuplicatedLatentResidual

# At (46, 14) floor(o * (r / d_out)) in float32 misses the exact floor.
SHAPES = [(12, 4), (10, 4), (7, 3), (3, 7), (5, 1), (1, 5), (46, 14)]


def index_of(expansion: Expansion, out_features: int, rank: int) -> torch.Tensor:
    if expansion == "random":
        return random_index(out_features, rank, seed=0, name="layer")
    return expansion_index(expansion, out_features, rank)


@pytest.mark.parametrize(("out_features", "rank"), SHAPES)
def test_contiguous_repeats_each_latent_k_times_cut_at_the_end(out_features: int, rank: int) -> None:
    k = math.ceil(out_features / rank)
    expected = torch.arange(rank).repeat_interleave(k)[:out_features]
    assert torch.equal(expansion_index("contiguous", out_features, rank), expected)


@pytest.mark.parametrize(("out_features", "rank"), SHAPES)
def test_balanced_is_the_exact_floor_and_uses_latents_evenly(out_features: int, rank: int) -> None:
    index = expansion_index("balanced", out_features, rank)
    assert index.tolist() == [o * rank // out_features for o in range(out_features)]
    counts = torch.bincount(index, minlength=rank)
    assert int(counts.max() - counts.min()) <= 1


@pytest.mark.parametrize(
    ("out_features", "rank", "unused"), [(1376, 128, 2), (2736, 256, 7), (5461, 512, 15), (11008, 1024, 23)]
)
def test_latents_without_a_copy_at_the_sizes_of_llama(out_features: int, rank: int, unused: int) -> None:
    assert rank - expansion_index("contiguous", out_features, rank).unique().numel() == unused
    assert expansion_index("balanced", out_features, rank).unique().numel() == rank


def test_random_index_depends_on_seed_and_name_alone() -> None:
    before = torch.random.get_rng_state()
    index = random_index(1000, 8, seed=0, name="layers.0.q_proj")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(index, random_index(1000, 8, seed=0, name="layers.0.q_proj"))
    assert not torch.equal(index, random_index(1000, 8, seed=1, name="layers.0.q_proj"))
    assert not torch.equal(index, random_index(1000, 8, seed=0, name="layers.1.q_proj"))
    counts = torch.bincount(index, minlength=8)
    assert counts.shape == (8,)
    assert counts.min() > 80


def test_random_index_never_moves() -> None:
    assert random_index(12, 5, seed=3, name="layers.0.q_proj").tolist() == [1, 2, 1, 4, 1, 2, 4, 3, 4, 1, 4, 0]


def test_random_has_no_index_from_the_shape() -> None:
    with pytest.raises(ValueError, match="random"):
        expansion_index("random", 8, 2)


def test_residual_coefficient() -> None:
    assert residual_coefficient(0.7, 10, 4, variance_correction=True) == pytest.approx(0.7 / math.sqrt(3), rel=1e-15)
    assert residual_coefficient(0.7, 3, 7, variance_correction=True) == 0.7
    assert residual_coefficient(0.7, 10, 4, variance_correction=False) == 0.7


@pytest.mark.parametrize("expansion", EXPANSIONS)
@pytest.mark.parametrize(("out_features", "rank"), SHAPES)
def test_added_duplicates_equal_the_literal_equation(expansion: Expansion, out_features: int, rank: int) -> None:
    index = index_of(expansion, out_features, rank)
    weight = torch.randn(out_features, rank, dtype=torch.float64)
    z = torch.randn(6, rank, dtype=torch.float64)
    torch.testing.assert_close(
        z @ effective_weight(weight, index, torch.full((len(index),), 0.7, dtype=torch.float64)).T,
        z @ weight.T + literal_residual(z, index, 0.7),
        rtol=1e-12,
        atol=1e-12,
    )


def test_added_duplicates_differentiate_in_weight_and_scale() -> None:
    index = expansion_index("contiguous", 5, 2)
    weight = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    c = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda weight, c: effective_weight(weight, index, c.expand(5)), (weight, c))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sum_is_rounded_once(dtype: torch.dtype) -> None:
    weight = (torch.randn(64, 8) / 30).to(dtype)
    index = expansion_index("contiguous", 64, 8)
    wide = weight.to(torch.promote_types(dtype, torch.float32), copy=True)
    wide[torch.arange(64), index] += 0.7
    assert torch.equal(
        effective_weight(weight, index, torch.full((len(index),), 0.7, dtype=torch.float64)), wide.to(dtype)
    )


def test_alpha_table_is_refused() -> None:
    with pytest.raises(ValueError, match="for_layer"):
        DuplicatedLatentResidual(4, 2, ResidualConfig(alpha={"q_proj": 1.0}))


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_state_is_small_and_survives_casts(expansion: Expansion, trainable: bool) -> None:
    config = ResidualConfig(alpha=0.7, expansion=expansion, trainable=trainable)
    residual = DuplicatedLatentResidual(10, 4, config, name="layer")
    before = {name: buffer.clone() for name, buffer in residual.named_buffers()}
    residual.to(torch.bfloat16).double()
    expected = {"spec"} | ({"index"} if expansion == "random" else set()) | ({"alpha"} if trainable else set())
    assert set(residual.state_dict()) == expected
    assert all(torch.equal(buffer, before[name]) for name, buffer in residual.named_buffers())
    assert DuplicatedLatentResidual.decode(residual.spec) == {
        "alpha": None if trainable else 0.7,
        "expansion": expansion,
        "latent_dim": 1,
        "signs": "none",
        "variance_correction": True,
    }


DAMAGED: list[list[Any]] = [
    [],
    [0, 255, 3],
    list(b"{}"),
    list(b"null"),
    list(b"[1]"),
    list(b'{"alpha": 1.0'),
    [1.5, 2.0],
    [300],
]


@pytest.mark.parametrize("values", DAMAGED)
def test_damaged_spec_is_refused(values: list[Any]) -> None:
    with pytest.raises(ValueError, match="spec in this state dict is damaged"):
        DuplicatedLatentResidual.decode(torch.tensor(values))


def test_repr_tells_the_choice() -> None:
    residual = DuplicatedLatentResidual(10, 4, ResidualConfig(alpha=0.7, trainable=True, expansion="balanced"))
    assert repr(residual) == (
        "DuplicatedLatentResidual(alpha=0.7 (trainable), K=3, expansion=balanced, variance_correction=True)"
    )
    signed = DuplicatedLatentResidual(10, 4, ResidualConfig(signs="random"), latent_dim=0)
    assert "latent_dim=0, signs=random" in repr(signed)
