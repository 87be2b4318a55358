"""Fold at step 0: the residual as a start of the up-projection and an anchor of its weight decay.

With alpha fixed, B enters the model only through B* = B + c R, so dL/dB = dL/dB*. An optimizer that is indifferent to
translation (SGD, Adam, Muon) therefore takes the same steps on B* as on B, and decoupled weight decay, which pulls B
towards 0, pulls B* towards c R:

    B  <- (1 - lr wd) B  - lr u    is    B* <- (1 - lr wd) B* - lr u + lr wd c R

So a run that folds before its first step and adds lr wd c R after each equals the run with the residual, while its
graph is the plain low-rank one, and each of its checkpoints can be deployed as it is.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from foldrank.fold import fold_
from foldrank.linear import LowRankLinear
from foldrank.tree import low_rank_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class _Anchor:
    layer: LowRankLinear
    index: Tensor
    c: float


class AnchoredDecay:
    """Makes the decoupled weight decay of an optimizer pull the folded layers of a model towards c R.

    Works through the optimizer's own step hook: right under learning-rate schedules, gradient clipping, skipped steps
    of mixed precision, `Trainer`, DDP and resuming. The optimizer must decay as AdamW does, by lr * weight_decay.
    """

    def __init__(self, anchors: list[_Anchor]) -> None:
        self._anchors = anchors

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Hooks into `optimizer`; the handle's `remove()` undoes it.

        Raises:
            ValueError: where the optimizer does not hold an anchored weight.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(anchor.layer.up.weight) not in held for anchor in self._anchors):
            raise ValueError("the optimizer does not hold every folded up-projection: build it from this model")
        return optimizer.register_step_post_hook(self._pull)

    @torch.no_grad()
    def _pull(self, optimizer: Optimizer, *_: Any) -> None:
        rates = {
            id(parameter): float(group["lr"]) * float(group.get("weight_decay", 0.0))
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for anchor in self._anchors:
            weight = anchor.layer.up.weight
            rate = rates[id(weight)]
            if rate and weight.grad is not None:
                # Rows and latents of the entries of R; each occurs once, so the order of the additions is no matter.
                rows = torch.arange(weight.shape[0], device=weight.device)
                pull = weight.new_full((1,), rate * anchor.c).expand(weight.shape[0])
                weight.index_put_((rows, anchor.index.to(weight.device)), pull, accumulate=True)


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
        anchors.append(_Anchor(layer=layer, index=layer.residual.latent_index().clone(), c=c))
    if not anchors:
        raise ValueError("the model has no residual to fold")
    fold_(model)
    return AnchoredDecay(anchors)
