"""What one transformer block keeps for the backward pass, from its shapes (the list at the top of accounting.py)."""

from typing import Any

from torch import nn

from foldrank.core.inventory import low_rank_layers
from foldrank.core.linear import LowRankLinear
from foldrank.core.sparse import SparseLowRankLinear
from foldrank.hf.crnet import CrossLayerLinear

KEEPS_INPUT = ("silu", "gelu")
"""Activations whose backward pass needs their input; that of the others needs their output, which the product keeps."""


def saved_per_token(block: nn.Module, config: Any, width: int) -> int:
    """Bytes that a block keeps of each token."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    inputs = 5 if width == 2 else 2
    latents = sum(layer.rank * (1 + (layer.activation_name in KEEPS_INPUT)) for layer in with_latents_in(block))
    before = 4 * d if handed_on(block, config) else 0
    return 2 * (2 * d + 1) * 4 + (inputs + 4) * d * width + 4 * heads + 4 * f * width + (latents + before) * width


def handed_on(block: nn.Module, config: Any) -> int:
    """Numbers of each token that a block takes from the projections of the one before: on CR-Net's backbone alone."""
    crosses = any(isinstance(layer, CrossLayerLinear) for layer in low_rank_in(block))
    return 5 * config.hidden_size + 2 * config.intermediate_size if crosses else 0


def effective_weights(module: nn.Module, width: int) -> int:
    """Bytes of the effective weights that are kept: as wide as the products, but for SLTrain, which casts by itself."""
    layers = [layer for layer in low_rank_in(module) if layer.weight_parametrizations]
    return sum(layer.up.weight.numel() * (4 if isinstance(layer, SparseLowRankLinear) else width) for layer in layers)


def low_rank_in(module: nn.Module) -> list[LowRankLinear]:
    """The low-rank layers."""
    return list(low_rank_layers(module).values())


def sparse_in(module: nn.Module) -> list[SparseLowRankLinear]:
    """Those of SLTrain."""
    return [layer for layer in low_rank_in(module) if isinstance(layer, SparseLowRankLinear)]


def with_latents_in(module: nn.Module) -> list[LowRankLinear]:
    """Those that compute latents: all but SLTrain's."""
    return [layer for layer in low_rank_in(module) if not isinstance(layer, SparseLowRankLinear)]
