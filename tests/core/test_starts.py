"""How factors start: orthogonal, and layers that write nothing at first."""

import pytest
import torch
from torch import nn

from foldrank import LowRankConfig, LowRankLinear, ResidualConfig, factorize_, fold_
from foldrank.core.inventory import low_rank_layers
from foldrank.recipes import RECIPES
from foldrank.train.model import build_model

from ..small_runs import SMALL_MODEL


@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(9, 14, 4), (14, 9, 9), (3, 5, 7), (6, 6, 1)])
def test_orthogonal_factors_have_the_norms_of_colas(d_in: int, d_out: int, rank: int) -> None:
    layer = LowRankLinear(d_in, d_out, rank, factor_start="orthogonal")
    for factor in (layer.down.weight.detach().double(), layer.up.weight.detach().double()):
        expected = rank**-0.25 * (d_in + d_out) ** -0.25 * factor.numel() ** 0.5
        assert float(factor.norm()) == pytest.approx(expected, rel=1e-5)
        values = torch.linalg.svdvals(factor)
        assert torch.allclose(values, values[:1].expand_as(values), rtol=1e-5)


def blocks(init: str, residual: ResidualConfig | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {name: nn.Linear(8, 8, bias=False) for name in ("q_proj", "o_proj", "up_proj", "down_proj", "head")}
    )
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
    factorize_(model, LowRankConfig(rank=3, init=init, targets=targets, residual=residual))  # pyright: ignore[reportArgumentType]
    return model


def test_writers_start_at_zero_and_have_no_residual() -> None:
    layers = low_rank_layers(blocks("zero_writers", ResidualConfig()))
    for name in ("o_proj", "down_proj"):
        assert layers[name].residual is None
        assert torch.count_nonzero(layers[name](torch.randn(4, 8))) == 0
    usual = low_rank_layers(blocks("cola", ResidualConfig()))
    for name in ("q_proj", "up_proj"):
        assert layers[name].residual is not None
        assert torch.equal(layers[name].up.weight, usual[name].up.weight)
    assert all(torch.equal(layers[name].down.weight, usual[name].down.weight) for name in layers)
    assert len(fold_(blocks("zero_writers", ResidualConfig())).errors) == 2


@pytest.mark.parametrize("init", ["orthogonal", "zero_writers"])
def test_a_recipe_starts_so_from_the_meta_device(init: str) -> None:
    recipe = RECIPES["demo"].override({**SMALL_MODEL, "model.num_layers": 1, "low_rank.init": init})
    layers = {name.rpartition(".")[2]: layer for name, layer in low_rank_layers(build_model(recipe, 61)).items()}
    if init == "orthogonal":
        values = torch.linalg.svdvals(layers["q_proj"].up.weight.detach())
        assert torch.allclose(values, values[:1].expand_as(values), rtol=1e-4)
    else:
        zero = {name for name, layer in layers.items() if not layer.up.weight.any()}
        assert zero == {name for name, layer in layers.items() if layer.residual is None} == {"o_proj", "down_proj"}


def test_starts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="init must be one of cola, orthogonal, zero_writers, got 'zeros'"):
        LowRankConfig(rank=3, init="zeros")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="init orthogonal is not for sltrain"):
        LowRankConfig(rank=3, init="orthogonal", backbone="sltrain")
    with pytest.raises(ValueError, match="no layer here is known by its name to write"):
        factorize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LowRankConfig(rank=2, init="zero_writers"))
