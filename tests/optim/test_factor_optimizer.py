"""Optimizers for factors against their formulas, PyTorch's own, and each other where they must agree."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldrank import LowRankConfig, LowRankLinear, ResidualConfig, factorize_
from foldrank.core.anchored_decay import fold_at_start_
from foldrank.optim import OPTIMIZERS, FactorOptimizer, factor_optimizer, newton_schulz

NAMES = list(OPTIMIZERS)


class Blocks(nn.Module):
    """Two blocks with low-rank and dense layers, a norm, an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 20), nn.SiLU(), nn.Linear(20, 12), nn.LayerNorm(12)) for _ in range(2)
        )
        self.head = nn.Linear(12, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.layers:
            x = x + block(x)
        return self.head(x)


def model_of(residual: ResidualConfig | None = None, *, dense: bool = True) -> Blocks:
    torch.manual_seed(0)
    model = Blocks()
    targets = ["layers.*.0"] if dense else ["layers.*.0", "layers.*.2"]
    config = LowRankConfig(rank=5, activation="silu", targets=targets, residual=residual)
    factorize_(model, config)
    return model.double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        ids = torch.randint(11, (8, 6), generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def names_by_rule(model: nn.Module, optimizer: FactorOptimizer) -> dict[tuple[str, float], set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        (group["rule"], group["weight_decay"]): {names[id(parameter)] for parameter in group["params"]}
        for group in optimizer.param_groups
    }


def test_each_parameter_goes_by_its_rule() -> None:
    model = model_of(ResidualConfig(trainable=True))
    by_rule = names_by_rule(model, factor_optimizer(model, "muon", lr=0.1, weight_decay=0.5))
    assert by_rule["muon", 0.5] == {
        *(f"layers.{block}.0.{factor}.weight" for block in (0, 1) for factor in ("down", "up")),
        *(f"layers.{block}.2.weight" for block in (0, 1)),
    }
    assert by_rule["adamw", 0.5] == {"embed.weight", "head.weight"}
    assert {name.rpartition(".")[2] for name in by_rule["adamw", 0.0]} == {"bias", "weight", "alpha"}
    assert sum(map(len, by_rule.values())) == len(list(model.parameters()))
    assert "rule: muon" in repr(factor_optimizer(model, "muon", lr=0.1))

    optimizer = factor_optimizer(model, "spectron", lr=0.006, weight_decay=0.5)
    rules = {rule for rule, _ in names_by_rule(model, optimizer)}
    assert rules == {"adamw", "muon", "spectron"}
    assert {round(group["lr"], 9) for group in optimizer.param_groups} == {0.006, 0.04}
    assert {round(rate, 9) for rate in optimizer.decay_rates().values()} == {0.003, 0.0}


def test_what_is_frozen_stays() -> None:
    model = model_of()
    model.layers[0].requires_grad_(False)
    before = copy.deepcopy(model.layers[0].state_dict())
    train(model, factor_optimizer(model, "muon", lr=0.1, weight_decay=0.5), 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.layers[0].state_dict().items())


def test_adamw_is_that_of_pytorch() -> None:
    ours, theirs = model_of(), model_of()
    optimizer = factor_optimizer(ours, "adamw", lr=0.01, weight_decay=0.1, betas=(0.9, 0.99))
    matrices = [parameter for parameter in theirs.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in theirs.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), fused=True)
    assert train(ours, optimizer, 10) == train(theirs, reference, 10)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (7, 7), (1, 9)])
def test_muon_is_that_of_pytorch_but_for_the_roundings_of_bfloat16(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    one, other = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    settings: dict[str, Any] = {"rule": "muon", "lr": 0.1, "weight_decay": 0.2}
    optimizer = FactorOptimizer([{"params": [one], **settings, "iterates_in": "bfloat16"}])
    reference = torch.optim.Muon([other], lr=0.1, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        one.grad = torch.randn(shape)
        other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
        # Five products of two rounded matrices each: what is compared is all else, scale, momentum and decay.
        assert float((one - other).detach().norm() / other.detach().norm()) < 0.1


@pytest.mark.parametrize("shape", [(3, 8, 5), (6, 6), (2, 1, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_newton_schulz_keeps_the_directions_and_evens_out_the_singular_values(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    result = newton_schulz(matrices)
    assert result.dtype == dtype
    values = torch.linalg.svdvals(result.double())
    assert float(values.max()) < 1.25
    if matrices.shape[-1] != matrices.shape[-2]:
        assert float(values.min()) > 0.6
    u, s, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    polynomial = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        polynomial = 3.4445 * polynomial - 4.7750 * polynomial**3 + 2.0315 * polynomial**5
    expected = (u * polynomial.unsqueeze(-2)) @ vh
    assert float((result.double() - expected).abs().max()) < {8: 1e-12, 4: 1e-5, 2: 2e-2}[dtype.itemsize]


def test_newton_schulz_of_nothing_is_nothing() -> None:
    assert torch.equal(newton_schulz(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_spectron_is_its_formula() -> None:
    torch.manual_seed(0)
    layer = LowRankLinear(9, 14, 4, residual=ResidualConfig(alpha=2.0)).double()
    down, up = layer.down.weight, layer.up.weight
    optimizer = factor_optimizer(layer, "spectron", lr=0.006, weight_decay=0.3)
    momenta = [torch.zeros_like(down), torch.zeros_like(up)]
    vectors = [torch.ones(9, dtype=torch.float64), torch.ones(4, dtype=torch.float64)]
    for step in range(6):
        before = [down.detach().clone(), up.detach().clone()]
        effective = [before[0], layer.effective_weight(before[1]).detach()]
        gradients = [torch.randn(weight.shape, dtype=torch.float64) for weight in before]
        down.grad, up.grad = (gradient.clone() for gradient in gradients)
        optimizer.step()
        sigmas = []
        for number, matrix in enumerate(effective):
            vectors[number] = F.normalize(matrix.T @ (matrix @ vectors[number]), dim=0)
            sigmas.append((matrix @ vectors[number]).norm())
            assert sigmas[-1] <= torch.linalg.matrix_norm(matrix, 2) + 1e-12
        eta = 0.006 * 0.04 / 0.006
        for number, (weight, old) in enumerate(zip((down, up), before, strict=True)):
            momenta[number] = 0.95 * momenta[number] + 0.05 * gradients[number]
            update = newton_schulz(0.05 * gradients[number] + 0.95 * momenta[number])
            expected = old * (1 - 0.006 * 0.3) - eta / (sigmas[0] + sigmas[1] + 1) * update
            assert torch.allclose(weight, expected, rtol=1e-12, atol=1e-14), step


def test_spectron_has_a_step_where_a_factor_starts_at_zero() -> None:
    layer = LowRankLinear(9, 14, 4)
    nn.init.zeros_(layer.up.weight)
    optimizer = factor_optimizer(layer, "spectron", lr=0.006)
    for _ in range(3):
        layer.down.weight.grad, layer.up.weight.grad = torch.randn(4, 9), torch.randn(14, 4)
        optimizer.step()
        optimizer.zero_grad()
    assert bool(layer.up.weight.isfinite().all())
    assert float(layer.up.weight.detach().norm()) > 0


@pytest.mark.parametrize("name", NAMES)
def test_folded_at_the_start_trains_as_the_residual_form(name: str) -> None:
    residual, folded = model_of(ResidualConfig()), model_of(ResidualConfig())
    start = fold_at_start_(folded)
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.5}
    optimizers = [factor_optimizer(model, name, **settings) for model in (residual, folded)]
    start.decay.attach(optimizers[1])
    losses = [train(model, optimizer, 100) for model, optimizer in zip((residual, folded), optimizers, strict=True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][-1] < losses[0][0] - 0.1


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_to_the_last_bit(name: str) -> None:
    model = model_of(ResidualConfig())
    optimizer = factor_optimizer(model, name, lr=0.01, weight_decay=0.1)
    train(model, optimizer, 5)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, optimizer, 5, first=5)
    other = model_of(ResidualConfig())
    other.load_state_dict(state[0])
    again = factor_optimizer(other, name, lr=0.5, weight_decay=0.9)
    again.load_state_dict(state[1])
    assert train(other, again, 5, first=5) == expected


def test_schedules_and_closures_work_as_with_any_optimizer() -> None:
    model = model_of()
    optimizer = factor_optimizer(model, "muon", lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    assert optimizer.step(lambda: 3.0) == 3.0
    schedule.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.05}


@pytest.mark.parametrize(
    ("name", "model", "complaint"),
    [
        ("sgd", nn.Linear(2, 2), "no optimizer is called 'sgd': there are adamw, muon, spectron"),
        ("spectron", nn.Linear(2, 2), "the model has none: take muon or adamw"),
        ("spectron", LowRankLinear(4, 4, 2, scale=0.5), "spectron does not know the low-rank scale"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, model: nn.Module, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        factor_optimizer(model, name, lr=0.1)
