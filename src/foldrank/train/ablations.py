"""What a sceptic of the residual asks for: the same layers without it, started with the norm that it would give them.

With alpha fixed DLR is a start of B, at W = B + c R, and a weight decay that pulls towards c R (docs/what-dlr-is.md).
Each ablation keeps the norm of W and leaves the anchor away:

    folded      W itself
    scaled      B, stretched
    random      B + N, stretched; N is normal noise with the norm of c R, in every entry and not in one a row
    orthogonal  columns orthogonal to each other and equally long
"""

import torch
from torch import Tensor, nn

from foldrank.core.fold import fold_
from foldrank.core.inventory import low_rank_layers
from foldrank.core.linear import LowRankLinear
from foldrank.recipes.schema import Ablation


@torch.no_grad()
def start_as_ablation_(model: nn.Module, ablation: Ablation) -> None:
    """Takes each residual of an untrained model away, in place, and starts its up-projection as the ablation says.

    Raises:
        ValueError: where there is no residual, or one with a trainable alpha; the model is then unchanged.
    """
    layers = check_ablation(model)
    before = [layer.up.weight.clone() for layer in layers]
    if ablation == "scaled" and not all(weight.any() for weight in before):
        raise ValueError("B starts at 0 in this backbone: there is nothing to scale")
    fold_(model)
    for layer, start in zip(layers, before, strict=True):
        weight = layer.up.weight
        if ablation != "folded":
            drawn = _drawn(ablation, start, weight - start)
            weight.copy_(drawn * (weight.norm() / drawn.norm()))


def check_ablation(model: nn.Module) -> list[LowRankLinear]:
    """The layers whose residual an ablation takes away; on the meta device as well.

    Raises:
        ValueError: where there is no residual, or one with a trainable alpha.
    """
    layers = [layer for layer in low_rank_layers(model).values() if layer.residual is not None]
    if not layers:
        raise ValueError("an ablation stands in for the residual: the model has none (low_rank.residual)")
    if any(layer.residual is not None and layer.residual.config.trainable for layer in layers):
        raise ValueError("an ablation has the norm that a fixed alpha gives, and alpha is trainable")
    return layers


def _drawn(ablation: Ablation, start: Tensor, added: Tensor) -> Tensor:
    if ablation == "scaled":
        return start
    if ablation == "random":
        noise = torch.randn_like(start)
        return start + noise * (added.norm() / noise.norm())
    return nn.init.orthogonal_(torch.empty_like(start))
