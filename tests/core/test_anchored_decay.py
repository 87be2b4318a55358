"""Fold at step 0 with anchored decay equals training with the residual."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from foldrank import LowRankConfig, ResidualConfig, factorize_, fold_
from foldrank.core.anchored_decay import fold_at_start_
from foldrank.core.config import EXPANSIONS, Expansion
from foldrank.core.inventory import low_rank_layers


def build(residual: ResidualConfig | None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 50), nn.Tanh(), nn.Linear(50, 7, bias=False)).double()
    factorize_(model, LowRankConfig(rank=4, activation="silu", targets=["0", "2"], residual=residual))
    return model


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float64}
    return [(torch.randn(8, 12, **draw), torch.randn(8, 7, **draw)) for _ in range(steps)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, share: slice = slice(None)) -> list[float]:
    """Warm-up, cosine, clipping: losses of each step, on a share of each batch."""
    cycled = "betas" in optimizer.defaults  # a cycled momentum would be given to plain SGD too
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=steps, cycle_momentum=cycled)
    losses = []
    for x, y in batches(steps):
        loss = (model(x[share]) - y[share]).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.dim() == 2]


OPTIMIZERS = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.5),
    "fused AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.5, fused=True),
    "NAdamW": lambda model: torch.optim.NAdam(
        model.parameters(), lr=0.02, weight_decay=0.5, decoupled_weight_decay=True
    ),
    "RAdamW": lambda model: torch.optim.RAdam(
        model.parameters(), lr=0.02, weight_decay=0.5, decoupled_weight_decay=True
    ),
    "Muon": lambda model: torch.optim.Muon(matrices(model), lr=0.02, weight_decay=0.5, momentum=0.9),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.02, weight_decay=0.5),
    "no decay": lambda model: torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0),
}


@pytest.mark.parametrize("expansion", EXPANSIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_the_residual_form_over_100_steps(optimizer: str, expansion: Expansion) -> None:
    with_residual = build(ResidualConfig(alpha=0.7, expansion=expansion))
    anchored = copy.deepcopy(with_residual)
    decay = fold_at_start_(anchored).decay
    anchored_optimizer = OPTIMIZERS[optimizer](anchored)
    decay.attach(anchored_optimizer)
    losses = train(with_residual, OPTIMIZERS[optimizer](with_residual), 100)
    assert train(anchored, anchored_optimizer, 100) == pytest.approx(losses, rel=1e-10)
    assert losses[-1] < losses[0]
    fold_(with_residual)
    for one, other in zip(with_residual.parameters(), anchored.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_without_the_anchor_decay_makes_another_model() -> None:
    with_residual = build(ResidualConfig(alpha=0.7))
    unanchored = copy.deepcopy(with_residual)
    fold_(unanchored)
    losses = train(with_residual, OPTIMIZERS["AdamW"](with_residual), 100)
    assert abs(train(unanchored, OPTIMIZERS["AdamW"](unanchored), 100)[-1] / losses[-1] - 1) > 1e-4


def test_the_handle_removes_it() -> None:
    model = build(ResidualConfig())
    decay = fold_at_start_(model).decay
    twin = copy.deepcopy(model)
    optimizer, plain = OPTIMIZERS["AdamW"](model), OPTIMIZERS["AdamW"](twin)
    decay.attach(optimizer).remove()
    assert train(model, optimizer, 5) == train(twin, plain, 5)


def test_refuses_what_it_cannot_do() -> None:
    trainable = build(ResidualConfig(trainable=True))
    with pytest.raises(ValueError, match="trainable"):
        fold_at_start_(trainable)
    assert all(layer.residual is not None for layer in low_rank_layers(trainable).values())
    scaled = nn.Sequential(nn.Linear(12, 50))
    factorize_(scaled, LowRankConfig(rank=4, scale=0.5, residual=ResidualConfig()))
    with pytest.raises(ValueError, match="0 has a low-rank scale"):
        fold_at_start_(scaled)
    with pytest.raises(ValueError, match="no residual"):
        fold_at_start_(nn.Sequential(nn.Linear(4, 4)))
    model = build(ResidualConfig())
    with pytest.raises(ValueError, match="build it from this model"):
        fold_at_start_(model).decay.attach(torch.optim.AdamW(build(ResidualConfig()).parameters()))


def momentum(parameters: Iterator[nn.Parameter], **how: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, momentum=0.9, **how)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.NAdam, momentum])
def test_refuses_decay_through_the_gradient(kind: Callable[..., torch.optim.Optimizer]) -> None:
    model = build(ResidualConfig())
    decay = fold_at_start_(model).decay
    with pytest.raises(ValueError, match="adds its weight decay to the gradient"):
        decay.attach(kind(model.parameters(), lr=0.02, weight_decay=0.5))
    decay.attach(kind(model.parameters(), lr=0.02, weight_decay=0.0))


def test_refuses_a_momentum_that_a_schedule_turns_on() -> None:
    model = build(ResidualConfig())
    decay = fold_at_start_(model).decay
    optimizer = OPTIMIZERS["SGD"](model)
    decay.attach(optimizer)
    train(model, optimizer, 2)
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match="adds its weight decay to the gradient"):
        train(model, optimizer, 1)


@pytest.mark.parametrize("optimizer", ["AdamW", "fused AdamW"])
def test_a_step_that_mixed_precision_skips_pulls_at_nothing(optimizer: str) -> None:
    model = build(ResidualConfig(alpha=0.7))
    decay = fold_at_start_(model).decay
    anchored_optimizer = OPTIMIZERS[optimizer](model)
    decay.attach(anchored_optimizer)
    scaler = torch.amp.GradScaler("cpu")
    moved = []
    for entry in (1.0, float("inf"), 1.0):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        x, y = batches(1)[0]
        scaler.scale((model(x) - y).square().mean() * entry).backward()
        scaler.step(anchored_optimizer)
        scaler.update()
        anchored_optimizer.zero_grad()
        moved.append(not all(map(torch.equal, before, model.parameters())))
    assert moved == [True, False, True]


def test_folded_at_start_runs_the_operations_of_plain_low_rank() -> None:
    def operations(model: nn.Module) -> list[str]:
        found: list[str] = []

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                found.append(str(func))
                return func(*args, **(kwargs or {}))

        x = torch.randn(5, 12, dtype=torch.float64)
        with Recorder():
            model(x).square().sum().backward()
        return found

    folded, plain = build(ResidualConfig(alpha=0.7)), build(None)
    fold_at_start_(folded)
    assert [type(module) for module in folded.modules()] == [type(module) for module in plain.modules()]
    assert operations(folded) == operations(plain)
    assert operations(build(ResidualConfig(alpha=0.7))) != operations(plain)
