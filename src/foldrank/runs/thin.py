"""Long series made short enough for a picture, without losing what stands out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST = 500
"""Points of a line: more than a screen is wide make it no better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Thinned:
    """A series by groups of neighbours."""

    x: list[float]
    """Of the last of each group."""
    mean: list[float]
    lowest: list[float]
    highest: list[float]
    grouped: bool
    """Whether any group has more than one."""


def thin(x: Sequence[float], y: Sequence[float], most: int = MOST) -> Thinned:
    """Means, lowest and highest of as many groups as may be.

    >>> thin([1, 2, 3, 4], [5.0, 1.0, 2.0, 2.0], most=2)
    Thinned(x=[2, 4], mean=[3.0, 2.0], lowest=[1.0, 2.0], highest=[5.0, 2.0], grouped=True)
    """
    if not x:
        return Thinned(x=[], mean=[], lowest=[], highest=[], grouped=False)
    size = -(-len(x) // most)
    starts = np.arange(0, len(x), size)
    ends = np.minimum(starts + size, len(x))
    values = np.asarray(y, dtype=float)
    return Thinned(
        x=np.asarray(x)[ends - 1].tolist(),
        mean=(np.add.reduceat(values, starts) / (ends - starts)).tolist(),
        lowest=np.minimum.reduceat(values, starts).tolist(),
        highest=np.maximum.reduceat(values, starts).tolist(),
        grouped=size > 1,
    )
