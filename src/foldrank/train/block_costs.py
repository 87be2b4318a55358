"""What a block, or a model, multiplies and keeps for the backward pass, from shapes (the top of accounting.py)."""

from typing import Any, NamedTuple

from torch import nn

from foldrank.core.inventory import inventory, linear_spec, low_rank_layers
from foldrank.core.linear import LowRankLinear
from foldrank.hf.crnet import CrossLayerLinear
from foldrank.surgery.sparse import SparseLowRankLinear

FAMILIES = ("llama", "mistral", "qwen3", "gpt2")
"""Of which it is known what a block keeps."""

KEEPS_INPUT = ("silu", "gelu")
"""Activations whose backward pass needs their input; that of the others needs their output, which the product keeps."""


class Widths(NamedTuple):
    """The letters of accounting.py, by any family's config."""

    d: int
    f: int
    heads: int
    key_value_heads: int
    q: int
    kv: int


def widths(config: Any) -> Widths:
    """What a config says of widths, whatever its family calls them."""
    d, heads = config.hidden_size, config.num_attention_heads
    f = config.n_inner or 4 * d if family(config) == "gpt2" else config.intermediate_size
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    of_a_head = getattr(config, "head_dim", None) or d // heads
    return Widths(d, f, heads, key_value_heads, heads * of_a_head, key_value_heads * of_a_head)


def family(config: Any) -> str:
    """The family of a config, low-rank or not.

    Raises:
        ValueError: for one whose blocks are not counted here.
    """
    name = config.model_type.removeprefix("lowrank_")
    if name not in FAMILIES:
        raise ValueError(
            f"what a block of the family {name!r} keeps is not known, only that of {', '.join(FAMILIES)}: for a run "
            "set train.micro_batch_size and train.chunked_loss"
        )
    return name


def saved_per_token(block: nn.Module, config: Any, width: int) -> int:
    """Bytes that a block keeps of each token."""
    n = widths(config)
    latents = sum(layer.rank * (1 + (layer.activation_name in KEEPS_INPUT)) for layer in with_latents_in(block))
    kept = 2 * n.q + 2 * n.kv + latents + kept_of_before(block, config)
    others = 2 * saved_by_norm(config) + 4 * n.heads
    if family(config) == "gpt2":
        return others + (2 * n.d + kept + 5 * n.f) * width + (2 * n.d if config.resid_pdrop else 0)
    if family(config) == "qwen3":
        others += (4 + width) * (n.q + n.kv) + 4 * (n.heads + n.key_value_heads)
    inputs = (5 if width == 2 else 2) * n.d
    return others + (inputs + kept + 4 * n.f) * width


def saved_by_norm(config: Any) -> int:
    """Bytes that a norm as wide as the residual stream keeps of each token."""
    d = widths(config).d
    return 4 * d + 8 if family(config) == "gpt2" else 4 * (2 * d + 1)


def kept_of_before(block: nn.Module, config: Any) -> int:
    """Numbers of each token that a block keeps of the one before: on CR-Net's backbone q, k, output and MLP."""
    n = widths(config)
    return 2 * n.d + n.q + n.kv if handed_on(block, config) else 0


def handed_on(block: nn.Module, config: Any) -> int:
    """Numbers of each token that a block takes from the projections of the one before: on CR-Net's backbone alone."""
    crosses = any(isinstance(layer, CrossLayerLinear) for layer in low_rank_in(block))
    n = widths(config)
    return 2 * n.d + n.q + 2 * n.kv + 2 * n.f if crosses else 0


def effective_weights(module: nn.Module, width: int) -> int:
    """Bytes of the effective weights that are kept: as wide as the products, but for SLTrain, which casts by itself."""
    layers = [layer for layer in low_rank_in(module) if layer.weight_parametrizations]
    return sum(layer.up.weight.numel() * (4 if isinstance(layer, SparseLowRankLinear) else width) for layer in layers)


def products(module: nn.Module) -> int:
    """N: weights of the matrices that multiply. A factor is an `nn.Linear` too; SLTrain has one whole matrix."""
    sparse = sparse_in(module)
    inside = {id(factor) for layer in sparse for factor in (layer.down, layer.up)}
    specs = [spec for part in module.modules() if id(part) not in inside and (spec := linear_spec(part))]
    return sum(layer.in_features * layer.out_features for layer in (*specs, *sparse))


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


def last_product(block: nn.Module) -> int:
    """Weights of the product with which a block ends, which is not computed again."""
    contents = inventory(block)
    last = [name for name in contents.modules if name in {**contents.low_rank_layers, **contents.linear_specs}][-1]
    if (dense := contents.linear_specs.get(last)) is not None:
        return dense.in_features * dense.out_features
    layer = contents.low_rank_layers[last]
    return 0 if isinstance(layer, SparseLowRankLinear) else layer.up.weight.numel()


def low_rank_in(module: nn.Module) -> list[LowRankLinear]:
    """The low-rank layers."""
    return list(low_rank_layers(module).values())


def sparse_in(module: nn.Module) -> list[SparseLowRankLinear]:
    """Those of SLTrain."""
    return [layer for layer in low_rank_in(module) if isinstance(layer, SparseLowRankLinear)]


def with_latents_in(module: nn.Module) -> list[LowRankLinear]:
    """Those that compute latents: all but SLTrain's."""
    return [layer for layer in low_rank_in(module) if not isinstance(layer, SparseLowRankLinear)]
