"""What follows from the equation (alpha fixed): training with the residual is training from B0 + c R without it."""

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from foldrank import LowRankLinear, ResidualConfig, fold_
from foldrank.core.config import EXPANSIONS, Expansion

from .models import residual_of

LR, DECAY = 0.02, 0.1
Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=LR),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=LR, momentum=0.9, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=LR),
}


def pair(expansion: Expansion) -> tuple[nn.Sequential, nn.Sequential]:
    """A network with residuals, and the plain one that starts from its folded weights."""
    torch.manual_seed(0)
    config = ResidualConfig(alpha=0.7, expansion=expansion)
    network = nn.Sequential(
        LowRankLinear(6, 10, 4, activation="silu", residual=config, dtype=torch.float64),
        LowRankLinear(10, 3, 2, bias=True, residual=config, dtype=torch.float64),
    )
    plain = copy.deepcopy(network)
    fold_(plain)
    return network, plain


def step(network: nn.Sequential, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    loss = (network(x) - x[..., :3]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("expansion", EXPANSIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_equals_the_plain_layer_started_at_the_folded_weight(optimizer: str, expansion: Expansion) -> None:
    network, plain = pair(expansion)
    optimizers = [OPTIMIZERS[optimizer](model.parameters()) for model in (network, plain)]
    first = last = torch.tensor(0.0)
    for number in range(20):
        x = torch.randn(16, 6, dtype=torch.float64)
        last = step(network, optimizers[0], x)
        torch.testing.assert_close(last, step(plain, optimizers[1], x), rtol=1e-9, atol=0)
        first = last if number == 0 else first
    assert last < first
    fold_(network)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(network.get_parameter(name), parameter, rtol=1e-8, atol=1e-10)


def test_weight_decay_pulls_the_folded_weight_towards_the_residual() -> None:
    network, plain = pair("contiguous")
    anchors = {
        f"{name}.up.weight": residual_of(layer)(torch.zeros_like(layer.up.weight)).detach()
        for name, layer in network.named_children()
        if isinstance(layer, LowRankLinear)
    }
    decayed = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=DECAY)
    undecayed = torch.optim.AdamW(plain.parameters(), lr=LR, weight_decay=0.0)
    for _ in range(20):
        x = torch.randn(16, 6, dtype=torch.float64)
        loss = step(network, decayed, x)
        before = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
        torch.testing.assert_close(loss, step(plain, undecayed, x), rtol=1e-9, atol=0)
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter -= LR * DECAY * (before[name] - anchors.get(name, 0.0))
    fold_(network)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(network.get_parameter(name), parameter, rtol=1e-8, atol=1e-10)


def test_trainable_alpha_learns() -> None:
    torch.manual_seed(0)
    layer = LowRankLinear(6, 10, 4, residual=ResidualConfig(trainable=True), dtype=torch.float64)
    optimizer = torch.optim.Adam([residual_of(layer).alpha], lr=LR)
    x = torch.randn(64, 6, dtype=torch.float64)
    target = LowRankLinear(6, 10, 4, residual=ResidualConfig(alpha=-0.4), dtype=torch.float64)
    target.down, target.up = layer.down, layer.up
    for _ in range(200):
        optimizer.zero_grad()
        (layer(x) - target(x).detach()).square().mean().backward()
        optimizer.step()
    assert residual_of(layer).alpha.item() == pytest.approx(-0.4, abs=1e-3)
