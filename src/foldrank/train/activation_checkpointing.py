"""What the backward pass computes again instead of keeping it: whole blocks, or all of them but their latents.

Keeping the latents is CoLA-M (arXiv 2502.10940): between its two passes a block keeps its input and, of each low-rank
layer, the product h = A x, r numbers per token. Norms, activations, attention and up-projections are computed again,
and no down-projection, which are about half of the products.

It stands on PyTorch's selective activation checkpointing, where a policy says of each operation whether its result is
kept. An operation does not tell which layer it belongs to: hooks on the down-projections tell the policy.
"""

from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from foldrank.core.inventory import low_rank_layers
from foldrank.recipes.train_config import Checkpointing
from foldrank.surgery.sparse import SparseLowRankLinear

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
"""What a linear layer computes below autograd; which of them, depends on the shape and layout of its input."""

_in_down_projection: ContextVar[bool] = ContextVar("_in_down_projection", default=False)
# Each thread has its own value: nn.DataParallel computes copies of a model in threads. And torch.compile leaves alone
# what sets one, where it would trace a global away and the policy would keep nothing, without a word.


def checkpoint_activations_(model: PreTrainedModel, checkpointing: Checkpointing | None) -> tuple[str, ...]:
    """Lets the blocks of `model` keep less for the backward pass, in place; losses and gradients stay the same.

    It works through transformers' activation checkpointing, so that `model.activation_checkpointing_disable()` undoes
    it; nothing of it is in the state dict, and in eval mode nothing is computed again. Through `torch.compile` blocks
    that keep their latents run uncompiled.

    Args:
        model: the model.
        checkpointing: what a block keeps: its input alone (`block`), its input and latents (`latents`), or all (None).

    Returns:
        The names of the layers whose latents are kept.

    Raises:
        ValueError: for `latents`, where the model computes none, and for an architecture without activation
            checkpointing; the model is then unchanged.
    """
    layers = {}
    if checkpointing == "latents":
        if why := without_latents(model):
            raise ValueError(why)
        _enable(model, context_fn=_contexts)
        layers = low_rank_layers(model)
        for layer in layers.values():
            layer.down.register_forward_pre_hook(_enter)
            # always_call: PyTorch ends the computation of a block by an exception, once it has what it needs.
            layer.down.register_forward_hook(_leave, always_call=True)
    elif checkpointing == "block":
        _enable(model)
    return tuple(layers)


def _enable(model: PreTrainedModel, **how: Any) -> None:
    # Before transformers 5.23 it had another name.
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **how})


def without_latents(model: nn.Module) -> str | None:
    """Why no latents of `model` can be kept, in words; None where they can."""
    layers = low_rank_layers(model)
    if not layers:
        return "activation_checkpointing latents: the model is dense and has no latents to keep; take block"
    blocks_alone = [
        name for name, layer in layers.items() if isinstance(layer, SparseLowRankLinear) and layer.activation is None
    ]
    if blocks_alone:
        return (
            f"activation_checkpointing latents: {len(blocks_alone)} layers, such as {blocks_alone[0]}, multiply by "
            "one dense matrix in training (SLTrain) and have no latents to keep; take block"
        )
    return None


def _enter(*_: Any) -> None:
    _in_down_projection.set(True)


def _leave(*_: Any) -> None:
    _in_down_projection.set(False)


def _policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    checkpointing = operation in PRODUCTS and _in_down_projection.get()
    return CheckpointPolicy.MUST_SAVE if checkpointing else CheckpointPolicy.PREFER_RECOMPUTE


_contexts = partial(create_selective_checkpoint_contexts, _policy)
