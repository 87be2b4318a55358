"""DLR in pure tensors: the latent that each output repeats, the paper's equation, and the weight that it amounts to.

    y = s (B z + V(z)) + b,   V(z)[o] = values[o] z[index[o]],   values = c = alpha / sqrt(K),   K = ceil(d_out / r)
      = B* z + b,             B* = s (B + V),  V[o, index[o]] = values[o]        (arXiv 2606.28932; V = c R there)

Where the residual is signed, values are +c and -c.

Read this file first, then residual.py, scale.py, linear.py and fold.py.
Shape suffixes: O = d_out output features, R = r latents; z has any batch shape before its last dimension.
"""

import math

import torch
from torch import Tensor

from foldrank.core.config import Expansion, Signs


def effective_weight(
    weight: Tensor,
    index_O: Tensor | None = None,
    values_O: Tensor | None = None,
    scale: float | Tensor | None = None,
    latent_dim: int = 1,
) -> Tensor:
    """B* = s (B + V), in at least float32, rounded once to the dtype of `weight`. The only place where B* is made.

    Args:
        weight: B.
        index_O: the latent that each output repeats; None without a residual.
        values_O: what is added there, one number for each output.
        scale: s, a number or a tensor of one element; None for 1.
        latent_dim: the dimension of `weight` that counts the latents.

    Shape:
        weight and result (d_out, r), or (r, d_out) with `latent_dim=0`; index_O int64 (d_out,); values_O (d_out,).

    Example:
        >>> index, values = torch.tensor([0, 0, 1]), torch.full((3,), 0.5)
        >>> effective_weight(torch.zeros(3, 2), index, values, scale=2.0).tolist()
        [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    """
    effective = weight.to(at_least_float32(weight.dtype))
    if index_O is not None and values_O is not None:
        index, values = index_O.unsqueeze(latent_dim), values_O.to(effective.dtype).unsqueeze(latent_dim)
        if torch.compiler.is_compiling():
            # A compiler fuses a comparison into its neighbours, where it would compute a scatter entry by entry.
            latents = torch.arange(weight.shape[latent_dim], device=weight.device).unsqueeze(1 - latent_dim)
            effective = effective + (index == latents) * values
        else:
            effective = effective.scatter_add(latent_dim, index, values)
    if scale is not None:
        effective = effective * scale
    return effective.to(weight.dtype)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for all else: where residual and scale are computed."""
    # torch.promote_types would become a node of an exported graph.
    return dtype if dtype == torch.float64 else torch.float32


def literal_residual(z: Tensor, index_O: Tensor, values_O: Tensor | float) -> Tensor:
    """The equation as the paper writes it, on activations: `c Expand(z)`, in the dtype of z.

    Shape:
        z (..., r), index_O int64 (d_out,), values_O (d_out,) or a number, result (..., d_out).

    Example:
        >>> literal_residual(torch.tensor([1.0, 2.0]), torch.tensor([0, 0, 1]), 0.5)
        tensor([0.5000, 0.5000, 1.0000])
    """
    expanded = z[..., index_O]
    return expanded * (values_O.to(z.dtype) if isinstance(values_O, Tensor) else values_O)


def expansion_index(
    expansion: Expansion, out_features: int, rank: int, *, device: torch.device | None = None
) -> Tensor:
    """The latent that each output repeats, for the expansions that follow from the shape alone.

    `contiguous`: o // K with K = ceil(out_features / rank), the paper's. `balanced`: floor(o * rank / out_features).

    Shape:
        int64 (out_features,), each entry in [0, rank).

    Raises:
        ValueError: for `random`, whose index is drawn once and saved (`random_index`).

    Example:
        >>> expansion_index("contiguous", 5, 2).tolist(), expansion_index("balanced", 5, 2).tolist()
        ([0, 0, 0, 1, 1], [0, 0, 0, 1, 1])
    """
    if expansion == "contiguous":
        numerator, divisor = 1, math.ceil(out_features / rank)
    elif expansion == "balanced":
        numerator, divisor = rank, out_features
    else:
        raise ValueError(f"the index of the {expansion!r} expansion does not follow from the shape")
    output_O = torch.arange(out_features, device=device) * numerator
    if torch.compiler.is_compiling():
        # PyTorch 2.13's compiler leaves the end of a divided range unwritten on a CPU (2736 // 11, more than one
        # thread). Of whole numbers as small as these the quotient in float64 has the right floor.
        return (output_O.double() / divisor).floor().long()
    return output_O // divisor


def output_signs(
    signs: Signs, out_features: int, *, drawn: Tensor | None = None, device: torch.device | None = None
) -> Tensor | None:
    """+1 or -1 for each output: `drawn` for `random`; +1 for even ones for `alternating`; None, all +1, for `none`.

    Shape:
        (out_features,).

    Raises:
        ValueError: for `random` without what was drawn once and saved (`random_signs`).
    """
    if signs == "random" and drawn is None:
        raise ValueError("random signs do not follow from the shape")
    return 1.0 - 2.0 * (torch.arange(out_features, device=device) & 1) if signs == "alternating" else drawn


def residual_coefficient(alpha: float, out_features: int, rank: int, *, variance_correction: bool) -> float:
    """The factor c = alpha / sqrt(K) with K = ceil(out_features / rank), or alpha where variance correction is off."""
    return alpha / math.sqrt(math.ceil(out_features / rank)) if variance_correction else alpha
