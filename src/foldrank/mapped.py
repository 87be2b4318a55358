"""How residual and scale map the up-projection: B to s (B + c R), on the weight, keeping B alone for the backward pass.

Shape suffixes: O = d_out output features, R = r latents, any batch shape before them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from foldrank.residual import add_duplicates


class UpMap(NamedTuple):
    """What `map_weight` needs besides B."""

    latents: Tensor | None
    """The latent that each output repeats; None without a residual."""
    c: float | Tensor | None
    """Strength of the residual, a number or a tensor of one element."""
    s: float | Tensor | None
    """Low-rank scale, likewise; None for 1."""


def map_weight(weight_OR: Tensor, up_map: UpMap) -> Tensor:
    """The weight s (B + c R), computed in at least float32 and rounded once to the dtype of B."""
    return _map_wide(weight_OR, up_map).to(weight_OR.dtype)


def _map_wide(weight_OR: Tensor, up_map: UpMap) -> Tensor:
    index_O, c, s = up_map
    wide_OR = weight_OR.to(torch.promote_types(weight_OR.dtype, torch.float32))
    if index_O is not None and c is not None:
        wide_OR = add_duplicates(wide_OR, index_O, c)
    return wide_OR if s is None else wide_OR * s


def map_gradients(grad_OR: Tensor, weight_OR: Tensor, up_map: UpMap) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From the gradient of `map_weight` those of B, and of c and s where they are tensors."""
    index_O, c, s = up_map
    grad_s = None
    if isinstance(s, Tensor):
        grad_s = (grad_OR.to(s.dtype) * _map_wide(weight_OR, up_map._replace(s=None))).sum().view_as(s).to(s.dtype)
    if s is not None:
        grad_OR = grad_OR * s
    grad_c = None
    if isinstance(c, Tensor) and index_O is not None:
        grad_c = grad_OR.gather(1, index_O[:, None]).to(c.dtype).sum().view_as(c)
    return grad_OR.to(weight_OR.dtype), grad_c, grad_s


class _MappedLinear(torch.autograd.Function):
    """`F.linear(z, s (B + c R), bias)` which keeps B for the backward pass: the map costs no memory in training.

    Shape:
        z (..., r), weight (d_out, r), bias (d_out,) or None; then the fields of an `UpMap`. Everything is computed in
        the dtype of z.
    """

    # Forward with ctx: setup_context, which torch.func would want, costs about 0.1 ms more a layer and step.
    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, bias: Tensor | None, *up_map: Any) -> Tensor:
        save(ctx, UpMap(*up_map), z, weight, bias)
        effective = map_weight(weight, UpMap(*up_map)).to(z.dtype)
        return F.linear(z, effective, None if bias is None else bias.to(z.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        up_map, z, weight, bias = saved(ctx)
        grad_z = grad_weight = grad_bias = grad_c = grad_s = None
        if ctx.needs_input_grad[0]:
            grad_z = grad @ map_weight(weight, up_map).to(grad.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
            grad_effective = grad.reshape(-1, grad.shape[-1]).T @ z.reshape(-1, z.shape[-1])
            grad_weight, grad_c, grad_s = map_gradients(grad_effective, weight, up_map)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(bias.dtype)
        return grad_z, grad_weight, grad_bias, None, grad_c, grad_s


def save(ctx: Any, up_map: UpMap, *tensors: Tensor | None) -> None:
    """Keeps an `UpMap` and tensors for the backward pass; `saved` gives them back."""
    ctx.save_for_backward(*tensors, *(entry if isinstance(entry, Tensor) else None for entry in up_map))
    ctx.numbers = tuple(None if isinstance(entry, Tensor) else entry for entry in up_map)


def saved(ctx: Any) -> tuple[Any, ...]:
    """The `UpMap`, then the tensors, that `save` kept."""
    *tensors, index_O, c, s = ctx.saved_tensors
    _, c_number, s_number = ctx.numbers
    return UpMap(index_O, c_number if c is None else c, s_number if s is None else s), *tensors


def mapped_linear(z: Tensor, weight: Tensor, bias: Tensor | None, up_map: UpMap) -> Tensor:
    """`F.linear(z, map_weight(weight, up_map), bias)`, without keeping the mapped weight for the backward pass.

    Shape:
        z (..., r), result (..., d_out), in the dtype of z or of autocast.
    """
    if torch.compiler.is_compiling():  # The compiler decides by itself what to keep.
        return F.linear(z, map_weight(weight, up_map), bias)
    output = _MappedLinear.apply(z.to(compute_dtype(z)), weight, bias, *up_map)
    assert isinstance(output, Tensor)
    return output


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a product with x is computed: its own, or that of autocast, which leaves float64 alone."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
