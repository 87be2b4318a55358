"""Fold at step 0, with weight decay that pulls towards the residual: docs/what-dlr-is.md derives it.

With alpha fixed, training B with the residual and decoupled weight decay equals training B* = B + c R by

    B* <- (1 - lr wd) B* - lr u + lr wd c R

The optimizer does all of it but the last term, which is added here, after its step.
"""

from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from foldrank.core.dtensor import distribute_like, to_local
from foldrank.core.fold import fold_
from foldrank.core.inventory import low_rank_layers
from foldrank.core.linear import LowRankLinear


class _Anchor:
    """A folded layer and its c R."""

    def __init__(self, layer: LowRankLinear, index_O: Tensor, c: float) -> None:
        self.layer = layer
        self.c = c
        self._index_O = index_O
        self._known: tuple[Tensor, Tensor] | None = None

    def pull(self, rate: float) -> None:
        """Adds rate c R to the weight, or to the part of it that this process holds."""
        rows, latents = self._entries().unbind(1)
        weight = to_local(self.layer.up.weight)
        # Each entry occurs once, so the order of the additions is no matter.
        weight.index_put_((rows, latents), weight.new_full((), rate * self.c), accumulate=True)

    def _entries(self) -> Tensor:
        """Row and latent of each entry of R in what this process holds: int64 (entries, 2)."""
        weight = self.layer.up.weight  # another one once FSDP2 has sharded it, which may be after the optimizer is made
        if self._known is None or self._known[0] is not weight:
            index_O1 = self._index_O.to(weight.device)[:, None]
            ones = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device).scatter_(1, index_O1, True)
            self._known = weight, to_local(distribute_like(ones, like=weight)).nonzero()
        return self._known[1].to(weight.device)


class AnchoredDecay:
    """Makes the decoupled weight decay of an optimizer pull the folded layers of a model towards c R.

    Works through the optimizer's own step hook: right under learning-rate schedules, gradient clipping, skipped steps
    of mixed precision, `Trainer`, DDP, FSDP2 and resuming. The optimizer must decay as AdamW does, by
    lr * weight_decay; plain SGD does so too, as long as it has no momentum.
    """

    def __init__(self, anchors: list[_Anchor]) -> None:
        self._anchors = anchors

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Hooks into `optimizer`; the handle's `remove()` undoes it.

        Raises:
            ValueError: where the optimizer decays through the gradient, or does not hold an anchored weight, then or at
                a later step.
        """
        self._rates(optimizer)
        return optimizer.register_step_post_hook(self._pull)

    @torch.no_grad()
    def _pull(self, optimizer: Optimizer, *_: Any) -> None:
        skipped = getattr(optimizer, "found_inf", None)  # a fused optimizer skips by itself what GradScaler tells it to
        if skipped is not None and skipped.any():
            return
        for anchor, rate in zip(self._anchors, self._rates(optimizer), strict=True):
            if rate and anchor.layer.up.weight.grad is not None:
                anchor.pull(rate)

    def _rates(self, optimizer: Optimizer) -> list[float]:
        """Of each anchored weight, lr * weight_decay."""
        # At each step, since a schedule may turn on a decay or a momentum.
        if _averages_decay(optimizer):
            raise ValueError(
                f"this {type(optimizer).__name__} adds its weight decay to the gradient: fold after training, or take "
                "an optimizer with decoupled decay, such as AdamW"
            )
        rates = {
            id(parameter): float(group["lr"]) * float(group.get("weight_decay", 0.0))
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        weights = [anchor.layer.up.weight for anchor in self._anchors]
        if any(id(weight) not in rates for weight in weights):
            raise ValueError(
                "the optimizer does not hold every folded up-projection: build it from this model, after fully_shard "
                "(wrappers that keep weights in another form, such as FSDP1 and ZeRO, are not supported)"
            )
        return [rates[id(weight)] for weight in weights]


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


def fold_at_start_(model: nn.Module) -> AnchoredDecay:
    """Folds each residual of an untrained model, in place, and returns the decay that makes up for it.

    Example:
        >>> from foldrank import LowRankConfig, ResidualConfig, factorize_
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        >>> report = factorize_(model, LowRankConfig(rank=2, residual=ResidualConfig()))
        >>> decay = fold_at_start_(model)
        >>> optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        >>> handle = decay.attach(optimizer)

    Raises:
        ValueError: where there is no residual, or a trainable alpha or a low-rank scale, which only the unfolded form
            can train; the model is then unchanged.
    """
    anchors = []
    for name, layer in low_rank_layers(model).items():
        if layer.residual is None:
            continue
        c = layer.residual.c()
        if isinstance(c, Tensor):
            raise ValueError(f"alpha of {name} is trainable: train with the residual and fold afterwards")
        if layer.scale is not None:
            raise ValueError(f"{name} has a low-rank scale, without which it takes other steps: fold after training")
        anchors.append(_Anchor(layer, layer.residual.latent_index().clone(), c))
    if not anchors:
        raise ValueError("the model has no residual to fold")
    fold_(model)
    return AnchoredDecay(anchors)
