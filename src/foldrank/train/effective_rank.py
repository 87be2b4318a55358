"""How many directions a matrix spans, by its singular values."""

import math
from collections.abc import Sequence


def effective_rank(values: Sequence[float]) -> float:
    """exp(entropy of the singular values over their sum): n where all n are equal, 1 where one is not zero.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, definition 1.

    >>> round(effective_rank([2.0, 2.0, 2.0, 0.0]), 9), effective_rank([5.0, 0.0])
    (3.0, 1.0)
    """
    total = math.fsum(values)
    fractions = [value / total for value in values if value > 0]
    return math.exp(-math.fsum(fraction * math.log(fraction) for fraction in fractions)) if fractions else 0.0
