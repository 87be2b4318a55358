"""What a block, or a model, multiplies and keeps for the backward pass, from shapes (the top of accounting.py)."""

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
    q, kv = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    inputs = (5 if width == 2 else 2) * d
    latents = sum(layer.rank * (1 + (layer.activation_name in KEEPS_INPUT)) for layer in with_latents_in(block))
    kept = inputs + 2 * q + 2 * kv + 4 * f + latents + kept_of_before(block, config)
    return 2 * (2 * d + 1) * 4 + 4 * heads + kept * width


def kept_of_before(block: nn.Module, config: Any) -> int:
    """Numbers of each token that a block keeps of the one before: on CR-Net's backbone q, k, output and MLP."""
    q, kv = (number * config.head_dim for number in (config.num_attention_heads, config.num_key_value_heads))
    return 2 * config.hidden_size + q + kv if handed_on(block, config) else 0


def handed_on(block: nn.Module, config: Any) -> int:
    """Numbers of each token that a block takes from the projections of the one before: on CR-Net's backbone alone."""
    crosses = any(isinstance(layer, CrossLayerLinear) for layer in low_rank_in(block))
    q, kv = (number * config.head_dim for number in (config.num_attention_heads, config.num_key_value_heads))
    return 2 * config.hidden_size + q + 2 * kv + 2 * config.intermediate_size if crosses else 0


def effective_weights(module: nn.Module, width: int) -> int:
    """Bytes of the effective weights that are kept: as wide as the products, but for SLTrain, which casts by itself."""
    layers = [layer for layer in low_rank_in(module) if layer.weight_parametrizations]
    return sum(layer.up.weight.numel() * (4 if isinstance(layer, SparseLowRankLinear) else width) for layer in layers)


def products(module: nn.Module) -> int:
    """N: weights of the matrices that multiply. A factor is an `nn.Linear` too; SLTrain has one whole matrix."""
    sparse = sparse_in(module)
    inside = {id(factor) for layer in sparse for factor in (layer.down, layer.up)}
    linears = [part for part in module.modules() if isinstance(part, nn.Linear) and id(part) not in inside]
    return sum(part.weight.numel() for part in linears) + sum(part.in_features * part.out_features for part in sparse)


def numbers_of_downs(module: nn.Module) -> int:
    """Weights of the down-projections of layers with latents."""
    return sum(layer.down.weight.numel() for layer in with_latents_in(module))


def numbers_of_effective_ups(module: nn.Module) -> int:
    """Weights of the up-projections that have an effective weight beside them."""
    return sum(layer.up.weight.numel() for layer in with_latents_in(module) if layer.weight_parametrizations)


def numbers_in_sparse(module: nn.Module) -> int:
    """Weights of the whole matrices by which SLTrain's layers multiply."""
    return sum(layer.in_features * layer.out_features for layer in sparse_in(module))


def products_that_make_whole(module: nn.Module) -> int:
    """Multiplications that make the whole matrices of SLTrain's layers, once."""
    return sum(layer.rank * layer.in_features * layer.out_features for layer in sparse_in(module))


def last_product(block: Any) -> int:
    """Weights of the product with which a block ends, which is not computed again."""
    last = block.mlp.down_proj
    if not isinstance(last, LowRankLinear):
        return last.weight.numel()
    return 0 if isinstance(last, SparseLowRankLinear) else last.up.weight.numel()


def low_rank_in(module: nn.Module) -> list[LowRankLinear]:
    """The low-rank layers."""
    return list(low_rank_layers(module).values())


def sparse_in(module: nn.Module) -> list[SparseLowRankLinear]:
    """Those of SLTrain."""
    return [layer for layer in low_rank_in(module) if isinstance(layer, SparseLowRankLinear)]


def with_latents_in(module: nn.Module) -> list[LowRankLinear]:
    """Those that compute latents: all but SLTrain's."""
    return [layer for layer in low_rank_in(module) if not isinstance(layer, SparseLowRankLinear)]
