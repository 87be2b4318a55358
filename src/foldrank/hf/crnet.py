"""The backbone `crnet` (CR-Net, arXiv 2509.18993): each layer adds what the same layer of the block before gave.

    Y_l = g Y_(l-1) + (B + c R) A X_l,    g = sign(b) (|b| + 1e-6), one b for each layer, which starts at 1

The first block is dense. It is for Llama alone: its blocks hand the outputs of their projections from one to the next
(`modeling_crnet_llama.py`, which also loads folded checkpoints without foldrank). Where b starts is ours: our source
does not say it.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from foldrank.core.linear import LowRankLinear
from foldrank.hf.modeling_crnet_llama import connect_, shortcut
from foldrank.surgery.backbones import BACKBONES, CONNECTIONS

START = 1.0
"""Of b."""


class CrossLayerLinear(LowRankLinear):
    """y = g y_before + B z, z = s act(A x), with the residual while training as every low-rank layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shortcut = nn.Parameter(self.down.weight.new_empty(1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As every low-rank layer, and b to its start."""
        super().reset_parameters()
        self.shortcut.fill_(START)

    @classmethod
    def num_extra_params(cls, in_features: int, out_features: int, **extra_config: Any) -> int:  # noqa: ARG003
        return 1

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """The output for x, given what the same layer of the block before put out, of the same shape as the output.

        Raises:
            ValueError: without that, where nothing hands it on.
        """
        if before is None:
            raise ValueError("a layer of crnet needs the output of the same layer in the block before")
        # The product last, so that a block that is computed again can stop before it.
        return shortcut(self.shortcut, before) + super().forward(x)


def connection(model: nn.Module, names: Collection[str]) -> Callable[[], None]:
    """What lets the blocks of a model hand on their outputs, once the layers called `names` are in it.

    Raises:
        ValueError: for a model that is no Llama, for layers outside its blocks, and where the first is not dense.
    """
    if not isinstance(model, LlamaPreTrainedModel):
        raise ValueError(f"the backbone crnet is for Llama alone, and this is a {type(model).__name__}")
    blocks = f"{model.base_model_prefix}.layers." if hasattr(model, model.base_model_prefix) else "layers."
    if outside := [name for name in names if not name.startswith(blocks)]:
        raise ValueError(f"the backbone crnet is for layers in the blocks, and {outside[0]} is in none: exclude it")
    if any(name.startswith(f"{blocks}0.") for name in names):
        raise ValueError("the first block of crnet is dense, as it has none before it: set dense_first to 1")
    return lambda: connect_(model)


BACKBONES["crnet"] = CrossLayerLinear
CONNECTIONS["crnet"] = connection
