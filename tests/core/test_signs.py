"""Signed residuals: the literal equation with +c and -c, wherever B* is made, and what is saved of them."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldrank import (
    LowRankConfig,
    LowRankLinear,
    ResidualConfig,
    attach_residual_,
    factorize_,
    fold_,
    fold_state_dict,
    fold_weight,
)
from foldrank.core.anchored_decay import fold_at_start_
from foldrank.core.config import EXPANSIONS
from foldrank.core.drawn import random_signs

SIGNED = ("alternating", "random")
SHAPES = [(9, 12, 4), (5, 10, 4), (4, 7, 3), (8, 3, 7), (6, 5, 1)]


def signs_of(config: ResidualConfig, out_features: int, name: str) -> Tensor:
    if config.signs == "random":
        return random_signs(out_features, seed=config.seed, name=name).double()
    return torch.tensor([1.0 if output % 2 == 0 else -1.0 for output in range(out_features)], dtype=torch.float64)


def literal(layer: LowRankLinear, x: Tensor, config: ResidualConfig, name: str) -> Tensor:
    assert layer.residual is not None
    z = layer.latents(x)
    k = -(-layer.out_features // layer.rank)
    alpha = layer.residual.alpha if config.trainable else config.alpha
    added = torch.stack([z[..., int(latent)] for latent in layer.residual.latent_index()], dim=-1)
    return layer.up(z) + alpha / k**0.5 * signs_of(config, layer.out_features, name) * added


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("expansion", EXPANSIONS)
@pytest.mark.parametrize("signs", SIGNED)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_those_of_the_literal_equation(
    shape: tuple[int, int, int], signs: Any, expansion: Any, trainable: bool
) -> None:
    d_in, d_out, rank = shape
    config = ResidualConfig(alpha=0.7, signs=signs, expansion=expansion, trainable=trainable, seed=3)
    torch.manual_seed(0)
    layer = LowRankLinear(d_in, d_out, rank, activation="silu", bias=True, residual=config, name="a.b").double()
    x = torch.randn(2, 6, d_in, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 6, d_out, dtype=torch.float64)
    inputs = (x, *layer.parameters())
    y, expected = layer(x), literal(layer, x, config, "a.b")
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-13)
    found = torch.autograd.grad(y, inputs, cotangent)
    for one, other in zip(found, torch.autograd.grad(expected, inputs, cotangent), strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-12)
    state = fold_state_dict(layer.state_dict())
    fold_(layer)
    assert torch.allclose(layer(x), expected, rtol=1e-12, atol=1e-13)
    assert all(torch.equal(state[name], tensor) for name, tensor in layer.state_dict().items())
    assert not any("signs" in name for name in state)


@pytest.mark.parametrize("signs", SIGNED)
@pytest.mark.parametrize("latent_dim", [0, 1])
def test_attached_weights(signs: Any, latent_dim: int) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(9, 4, bias=False), nn.Linear(4, 10, bias=False)).double()
    if latent_dim == 0:
        model[1].weight = nn.Parameter(model[1].weight.detach().T.contiguous())
    before = model[1].weight.detach().clone()
    attach_residual_(model, ["1.weight"], config := ResidualConfig(signs=signs), latent_dim=latent_dim)
    residual: Any = next(module for module in model.modules() if type(module).__name__ == "DuplicatedLatentResidual")
    signs_O = signs_of(config, 10, residual.name)
    expected = before.clone()
    for output in range(10):
        index = (output // 3, output) if latent_dim == 0 else (output, output // 3)
        expected[index] += signs_O[output] / 3**0.5
    assert torch.allclose(model[1].weight, expected, rtol=1e-13)
    state = fold_state_dict(model.state_dict())
    fold_(model)
    assert torch.allclose(model[1].weight, expected, rtol=1e-13)
    assert torch.equal(state["1.weight"], model[1].weight)


def model_of(signs: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 7)).double()
    factorize_(model, LowRankConfig(rank=3, targets=["0", "2"], residual=ResidualConfig(signs=signs)))
    return model


@pytest.mark.parametrize("signs", SIGNED)
def test_the_anchored_decay_pulls_to_the_signed_residual(signs: Any) -> None:
    losses = []
    for at_start in (False, True):
        model = model_of(signs)
        start = fold_at_start_(model) if at_start else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
        if start is not None:
            start.decay.attach(optimizer)
        for step in range(50):
            x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            loss = F.mse_loss(model(x), x[:, :7])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:50] == pytest.approx(losses[50:], rel=1e-9)


@pytest.mark.parametrize("signs", SIGNED)
def test_a_state_dict_carries_its_signs(signs: Any) -> None:
    model = model_of(signs)
    state = copy.deepcopy(model.state_dict())
    other = model_of(signs)
    if signs == "random":
        # What was drawn is in the state, so that a renamed layer keeps it.
        state["0.residual.signs"] = -state["0.residual.signs"]
    other.load_state_dict(state)
    x = torch.randn(4, 8, dtype=torch.float64)
    assert torch.equal(other(x), model(x)) == (signs == "alternating")
    with pytest.raises(RuntimeError, match="build the model with the residual that the checkpoint was trained with"):
        model_of("none").load_state_dict(state)
    half = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    assert fold_state_dict(half).keys() == fold_state_dict(state).keys()


def test_a_spec_from_before_signs_has_none() -> None:
    model = model_of("none")
    state = model.state_dict()
    text = bytes(state["0.residual.spec"].tolist()).decode().replace('"signs": "none", ', "")
    assert "signs" not in text
    state["0.residual.spec"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    model_of("none").load_state_dict(state)
    fold_state_dict(state)


def test_alternating_signs_write_nothing_into_the_direction_of_all_ones_where_k_is_even() -> None:
    z = torch.rand(5, 4, dtype=torch.float64)
    zeros = torch.zeros(16, 4, dtype=torch.float64)
    plain, signed = F.linear(z, fold_weight(zeros)), F.linear(z, fold_weight(zeros, signs="alternating"))
    assert float(signed.sum(-1).abs().max()) < 1e-12
    assert float(plain.sum(-1).abs().min()) > 0.1
    assert torch.allclose(plain.norm(dim=-1), signed.norm(dim=-1))


def test_signs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="signs must be one of none, alternating, random, got 'odd'"):
        ResidualConfig(signs="odd")  # pyright: ignore[reportArgumentType]
    for signs in (torch.ones(3), torch.tensor([1.0, 0.0, 1.0, 1.0])):
        with pytest.raises(ValueError, match="signs must be \\+1 or -1 for each of 4 outputs"):
            fold_weight(torch.zeros(4, 2), signs=signs)
    with pytest.raises(ValueError, match="random signs do not follow from the shape"):
        fold_weight(torch.zeros(4, 2), signs="random")


@pytest.mark.parametrize(
    ("scope", "expected"),
    [("reading", {"q_proj", "up_proj", "gate"}), ("writing", {"o_proj", "down_proj", "out_proj"})],
)
def test_scopes_by_what_a_layer_does_to_the_residual_stream(scope: str, expected: set[str]) -> None:
    names = ("q_proj", "o_proj", "up_proj", "gate", "down_proj", "out_proj", "mixer")
    block = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
    model: Any = nn.ModuleDict({"block": block, "head": nn.Linear(4, 4)})
    factorize_(model, LowRankConfig(rank=2, residual=ResidualConfig(scope=scope), targets=list(names)))
    found = {name for name, layer in model["block"].items() if getattr(layer, "residual", None) is not None}
    assert found == expected
