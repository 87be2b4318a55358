"""How residual and scale map the up-projection: B to s (B + c R), on the weight, for the time and memory of B alone.

Shape suffixes: O = d_out output features, R = r latents, any batch shape before them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from foldrank.core.residual import WIDE, add_entries

TOKENS_PER_LATENT = 64
"""From so many tokens a latent on, a pass keeps the mapped weight, for PyTorch's own backward pass, which needs no
Python: 1 % of a small model's time. The weight is then at most a sixty-fourth of the layer's output."""


class UpMap(NamedTuple):
    """What `map_weight` needs besides B: s (B + c R) is B with `added` to its entries `latents`, times s."""

    latents: Tensor | None
    """int64 (d_out, 1), the latent that each output repeats; None without a residual."""
    added: Tensor | None
    """(d_out, 1), c for each output, in at least float32."""
    s: float | Tensor | None
    """Low-rank scale, a number or a tensor of one element; None for 1."""


def map_weight(weight_OR: Tensor, up_map: UpMap) -> Tensor:
    """The weight s (B + c R), computed in at least float32 and rounded once to the dtype of B."""
    latents_O1, added_O1, s = up_map
    mapped_OR = weight_OR if weight_OR.dtype in WIDE else weight_OR.float()
    if latents_O1 is not None and added_O1 is not None:
        mapped_OR = add_entries(mapped_OR, latents_O1, added_O1)
    if s is not None:
        mapped_OR = mapped_OR * s
    return mapped_OR.to(weight_OR.dtype)


def map_gradients(grad_OR: Tensor, weight_OR: Tensor, up_map: UpMap) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From the gradient of `map_weight` those of B, and of `added` and s where they are learned."""
    latents_O1, added_O1, s = up_map
    grad_added = grad_s = None
    if isinstance(s, Tensor):
        unscaled_OR = map_weight(weight_OR.to(s.dtype), up_map._replace(s=None))
        grad_s = (grad_OR.to(s.dtype) * unscaled_OR).sum().view_as(s)
    if s is not None:
        grad_OR = grad_OR * s
    if latents_O1 is not None and added_O1 is not None and added_O1.requires_grad:
        grad_added = grad_OR.gather(1, latents_O1).to(added_O1.dtype)
    return grad_OR.to(weight_OR.dtype), grad_added, grad_s


class _MappedLinear(torch.autograd.Function):
    """`F.linear(z, s (B + c R), bias)` which keeps B for the backward pass: the map costs no memory in training.

    Shape:
        z (..., r), weight (d_out, r), bias (d_out,) or None; then the fields of an `UpMap`. Everything is computed in
        the dtype of z.
    """

    # This runs in every layer and step, where 0.1 ms is 1 % of a small model's step. Hence forward with ctx rather than
    # setup_context, which torch.func would want. The products are those of PyTorch's own layer and cost the same.
    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, bias: Tensor | None, *up_map: Any) -> Tensor:
        ctx.save_for_backward(z, weight, bias)
        ctx.up_map = UpMap(*up_map)
        effective = map_weight(weight, ctx.up_map).to(z.dtype)
        return F.linear(z, effective, None if bias is None else bias.to(z.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, weight, bias = ctx.saved_tensors
        grad_z = grad_weight = grad_bias = grad_added = grad_s = None
        grad_TO = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = grad_TO.sum(0).to(bias.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
            grad_effective = grad_TO.T @ z.reshape(-1, z.shape[-1])
            grad_weight, grad_added, grad_s = map_gradients(grad_effective, weight, ctx.up_map)
        if ctx.needs_input_grad[0]:  # last, so that it is in the cache for what comes next
            grad_z = (grad_TO @ map_weight(weight, ctx.up_map).to(grad.dtype)).view_as(z)
        return grad_z, grad_weight, grad_bias, None, grad_added, grad_s


def mapped_linear(z: Tensor, weight: Tensor, bias: Tensor | None, up_map: UpMap) -> Tensor:
    """`F.linear(z, map_weight(weight, up_map), bias)`, keeping the mapped weight where it is small beside y.

    Shape:
        z (..., r), result y (..., d_out), in the dtype of z or of autocast.
    """
    # A compiler decides by itself what to keep.
    if torch.compiler.is_compiling() or keeps_mapped_weight(z.numel() // z.shape[-1], z.shape[-1]):
        return F.linear(z, map_weight(weight, up_map), bias)
    output = _MappedLinear.apply(z.to(compute_dtype(z)), weight, bias, *up_map)
    assert isinstance(output, Tensor)
    return output


def keeps_mapped_weight(num_tokens: int, rank: int) -> bool:
    """Whether a pass of so many tokens keeps the mapped weight for the backward pass."""
    return num_tokens >= TOKENS_PER_LATENT * rank


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a product with x is computed: its own, or that of autocast, which leaves float64 alone."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
