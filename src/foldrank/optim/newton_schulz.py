"""The nearest semi-orthogonal matrix, about: U V^T of a matrix U S V^T, by products alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from foldrank.core.functional import at_least_float32

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: steepest at 0, so that five steps bring all singular values near 1 (Muon, Jordan 2024)."""

STEPS = 5


def newton_schulz(matrices: Tensor, *, steps: int = STEPS, dtype: torch.dtype | None = None) -> Tensor:
    """Each matrix with its singular values brought to between 0.7 and 1.2, about.

    Args:
        matrices: of any number of leading dimensions.
        steps: iterations.
        dtype: in which it iterates; None: that of the matrices, at least float32. bfloat16 is faster on devices that
            multiply in it, and makes equal runs part by 1e-4.

    Shape:
        (..., m, n) to the same, in the dtype of `matrices`.

    Example:
        >>> singular_values = torch.linalg.svdvals(newton_schulz(torch.diag(torch.tensor([1.0, 0.1]))))
        >>> bool(((singular_values > 0.6) & (singular_values < 1.3)).all())
        True
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).to(dtype or at_least_float32(matrices.dtype))
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny ** 0.5)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x if wide else x.mT).to(matrices.dtype)


def orthogonalized(matrices: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """`newton_schulz` of each matrix, those of one shape at once."""
    by_shape: dict[tuple[object, ...], list[int]] = {}
    for number, matrix in enumerate(matrices):
        by_shape.setdefault((matrix.shape, matrix.dtype, matrix.device), []).append(number)
    results = list(matrices)
    for numbers in by_shape.values():
        stacked = newton_schulz(torch.stack([matrices[number] for number in numbers]), dtype=dtype)
        for number, result in zip(numbers, stacked, strict=True):
            results[number] = result
    return results
