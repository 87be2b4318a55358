"""Fold at step 0, with weight decay that pulls towards the residual: docs/what-dlr-is.md derives it.

With alpha fixed, training B with the residual and decoupled weight decay equals training B* = B + c R by

    B* <- (1 - lr wd) B* - lr u + lr wd c R

The optimizer does all of it but the last term, which is added here, after its step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from foldrank.core.dtensor import distribute_like, to_local
from foldrank.core.fold import FoldReport, fold_
from foldrank.core.inventory import low_rank_layers
from foldrank.core.linear import LowRankLinear
from foldrank.core.residual import DuplicatedLatentResidual


class _Target:
    """A folded layer and what its weight decays to, c R."""

    def __init__(self, layer: LowRankLinear, residual: DuplicatedLatentResidual) -> None:
        self.layer = layer
        self._residual = residual
        self._cached: tuple[Tensor, tuple[Tensor, ...], Tensor] | None = None

    def decay(self, rate: float) -> None:
        """Adds rate c R to the weight, or to the part of it that this process holds."""
        position, values = self._entries()
        weight = to_local(self.layer.up.weight)
        # Not accumulated, since each entry occurs once: a GPU would sort the positions first.
        weight[position] += (rate * values).to(weight.dtype)

    def _entries(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """Positions and values of the entries of c R, which has one a row, in what this process holds."""
        weight = self.layer.up.weight  # another one once FSDP2 has sharded it, which may be after the optimizer is made
        if self._cached is None or self._cached[0] is not weight:
            zeros = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
            c_r = to_local(distribute_like(self._residual.to(weight.device)(zeros), like=weight))
            position = c_r.nonzero(as_tuple=True)
            self._cached = weight, position, c_r[position]
        return self._cached[1], self._cached[2]


class AnchoredDecay:
    """Makes the decoupled weight decay of an optimizer of the folded layers of a model lead to c R.

    Works through the optimizer's own step hook: right under learning-rate schedules, gradient clipping, skipped steps
    of mixed precision, `Trainer`, DDP, FSDP2 and resuming. The optimizer must decay as AdamW does, by
    lr * weight_decay; plain SGD does so too, as long as it has no momentum.

    Example:
        >>> from foldrank import LowRankConfig, ResidualConfig, factorize_
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> _ = factorize_(model, LowRankConfig(rank=2, targets=["0"], residual=ResidualConfig()))
        >>> decay = fold_at_start_(model).decay
        >>> decay.attach(torch.optim.AdamW(model.parameters(), weight_decay=0.1)) is not None
        True
    """

    def __init__(self, targets: Sequence[_Target]) -> None:
        self._targets = targets

    def __add__(self, other: "AnchoredDecay") -> "AnchoredDecay":
        """That of both, as of blocks that are folded one after the other."""
        return AnchoredDecay([*self._targets, *other._targets])

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Hooks into `optimizer`; the handle's `remove()` undoes it.

        Raises:
            ValueError: where the optimizer decays through the gradient, or does not hold an anchored weight, then or at
                a later step.
        """
        self._rates(optimizer)
        return optimizer.register_step_post_hook(self._decay)

    @torch.no_grad()
    def _decay(self, optimizer: Optimizer, *_: Any) -> None:
        skipped = getattr(optimizer, "found_inf", None)  # a fused optimizer skips by itself what GradScaler tells it to
        if skipped is not None and skipped.any():
            return
        for target, rate in zip(self._targets, self._rates(optimizer), strict=True):
            if rate and target.layer.up.weight.grad is not None:
                target.decay(rate)

    def _rates(self, optimizer: Optimizer) -> list[float]:
        """Of each anchored weight, lr * weight_decay."""
        # At each step, since a schedule may turn on a decay or a momentum.
        if _averages_decay(optimizer):
            raise ValueError(
                f"this {type(optimizer).__name__} adds its weight decay to the gradient: fold after training, or take "
                "an optimizer with decoupled decay, such as AdamW"
            )
        # An optimizer may say itself how much a step decays.
        rates: dict[int, float] = getattr(optimizer, "decay_rates", partial(decoupled_decay, optimizer))()
        weights = [target.layer.up.weight for target in self._targets]
        if any(id(weight) not in rates for weight in weights):
            raise ValueError(
                "the optimizer does not hold every folded up-projection: build it from this model, after fully_shard "
                "(wrappers that keep weights in another form, such as FSDP1 and ZeRO, are not supported)"
            )
        return [rates[id(weight)] for weight in weights]


def decoupled_decay(optimizer: Optimizer) -> dict[int, float]:
    """From the id of each parameter to the share of it that decays in a step, as AdamW decays: lr * weight_decay."""
    return {
        id(parameter): float(group["lr"]) * float(group.get("weight_decay", 0.0))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _averages_decay(optimizer: Optimizer) -> bool:
    """Whether it decays through a gradient that it averages or scales. Plain SGD does neither and decays by lr wd."""
    coupled = (optim.ASGD, optim.RMSprop, optim.Rprop, optim.Adagrad, optim.Adadelta, optim.Adamax)
    return any(
        isinstance(optimizer, coupled)
        or (isinstance(optimizer, optim.SGD) and bool(group["momentum"]))
        or not group.get("decoupled_weight_decay", True)
        for group in optimizer.param_groups
        if group.get("weight_decay")
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldAtStartReport:
    """What `fold_at_start_` did.

    Example:
        >>> from foldrank import LowRankConfig, ResidualConfig, factorize_
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> _ = factorize_(model, LowRankConfig(rank=2, targets=["0"], residual=ResidualConfig()))
        >>> len(fold_at_start_(model).fold.errors)
        1
    """

    fold: FoldReport
    """The layers that were folded, with the rounding error of each."""
    decay: AnchoredDecay
    """To be attached to the optimizer: the weight decay that goes with it."""

    def __str__(self) -> str:
        return str(self.fold)

    def summary(self) -> str:
        """One line: how many layers."""
        return self.fold.summary()


def fold_at_start_(model: nn.Module) -> FoldAtStartReport:
    """Folds each residual of an untrained model, in place, and returns with it the decay that makes up for it.

    Example:
        >>> from foldrank import LowRankConfig, ResidualConfig, factorize_
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        >>> report = factorize_(model, LowRankConfig(rank=2, targets=["0", "2"], residual=ResidualConfig()))
        >>> start = fold_at_start_(model)
        >>> optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        >>> handle = start.decay.attach(optimizer)

    Raises:
        ValueError: where there is no residual, or a trainable alpha or a low-rank scale, which only the unfolded form
            can train, and as `fold_`; the model is then unchanged.
    """
    targets = [_Target(layer, residual) for layer, residual in check_foldable_at_start(model)]
    return FoldAtStartReport(fold=fold_(model), decay=AnchoredDecay(targets))


def check_foldable_at_start(model: nn.Module) -> list[tuple[LowRankLinear, DuplicatedLatentResidual]]:
    """The layers that `fold_at_start_` would fold, with their residuals; on the meta device as well.

    Raises:
        ValueError: as `fold_at_start_`, as far as the settings tell.
    """
    layers = []
    for name, layer in low_rank_layers(model).items():
        if layer.residual is None:
            continue
        if layer.residual.config.trainable:
            raise ValueError(f"alpha of {name} is trainable: train with the residual and fold afterwards")
        if layer.scale is not None:
            raise ValueError(f"{name} has a low-rank scale, without which it takes other steps: fold after training")
        layers.append((layer, layer.residual))
    if not layers:
        raise ValueError("the model has no residual to fold")
    return layers
