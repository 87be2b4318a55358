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

from foldrank.core.drawn import named_generator
from foldrank.core.fold import fold_
from foldrank.core.inventory import low_rank_layers
from foldrank.core.linear import LowRankLinear
from foldrank.recipes.train_config import Ablation


@torch.no_grad()
def start_as_ablation_(model: nn.Module, ablation: Ablation, seed: int) -> tuple[str, ...]:
    """Takes each residual of an untrained model away, in place, and starts its up-projection as the ablation says.

    Args:
        model: untrained, with residuals.
        ablation: the start that stands in for the residual.
        seed: of what is drawn, as in train/start.py: the same on every device.

    Returns:
        The names of the layers.

    Raises:
        ValueError: where there is no residual, or one with a trainable alpha; the model is then unchanged.
    """
    layers = check_ablation(model)
    before = {name: layer.up.weight.clone() for name, layer in layers.items()}
    if ablation == "scaled" and not all(weight.any() for weight in before.values()):
        raise ValueError("B starts at 0 in this backbone: there is nothing to scale")
    fold_(model)
    for name, start in before.items():
        weight = layers[name].up.weight
        if ablation != "folded":
            drawn = _drawn(ablation, start, weight - start, named_generator(seed, f"{name}/{ablation}"))
            weight.copy_(drawn * (weight.norm() / drawn.norm()))
    return tuple(layers)


def check_ablation(model: nn.Module) -> dict[str, LowRankLinear]:
    """The layers whose residual an ablation takes away, by name; on the meta device as well.

    Raises:
        ValueError: where there is no residual, or one with a trainable alpha.
    """
    layers = {name: layer for name, layer in low_rank_layers(model).items() if layer.residual is not None}
    if not layers:
        raise ValueError("an ablation stands in for the residual: the model has none (low_rank.residual)")
    if any(layer.residual is not None and layer.residual.config.trainable for layer in layers.values()):
        raise ValueError("an ablation has the norm that a fixed alpha gives, and alpha is trainable")
    return layers


def _drawn(ablation: Ablation, start: Tensor, added: Tensor, generator: torch.Generator) -> Tensor:
    if ablation == "scaled":
        return start
    on_cpu = torch.empty_like(start, device="cpu")
    if ablation == "random":
        noise = on_cpu.normal_(generator=generator).to(start.device)
        return start + noise * (added.norm() / noise.norm())
    return nn.init.orthogonal_(on_cpu, generator=generator).to(start.device)
