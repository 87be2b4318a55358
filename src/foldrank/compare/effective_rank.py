"""What a folded model's weight matrices span: singular values and the effective rank."""

from collections.abc import Sequence
from dataclasses import dataclass

from foldrank.train.effective_rank import effective_rank

DRAWN = 100
"""Values of a spectrum that are kept for drawing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spectrum:
    """The singular values of one layer's whole matrix."""

    layer: str
    method: str
    size: int
    """How many there are."""
    effective_rank: float
    drawn: tuple[tuple[int, float], ...]
    """(index from 1, value over the largest), at most `DRAWN` of them."""


def spectrum(layer: str, method: str, values: Sequence[float]) -> Spectrum:
    """Summary of a layer's singular values, largest first."""
    last = len(values) - 1
    positions = (
        sorted({round(step * last / (DRAWN - 1)) for step in range(DRAWN)}) if last >= DRAWN else range(last + 1)
    )
    largest = values[0] or 1.0
    return Spectrum(
        layer=layer,
        method=method,
        size=len(values),
        effective_rank=effective_rank(values),
        drawn=tuple((position + 1, float(f"{values[position] / largest:.4g}")) for position in positions),
    )
