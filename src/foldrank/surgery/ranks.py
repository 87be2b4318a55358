"""Ranks that a budget of parameters allows: one common fraction of each layer's full rank."""

from collections.abc import Mapping

STEPS = 60
"""Halvings of the interval in which the fraction lies; more change nothing in a float."""


def solve_ranks(
    shapes: Mapping[str, tuple[int, int]], *, budget: float, total: int, other_params: int
) -> dict[str, int]:
    """The ranks with which a model keeps a share `budget` of its parameters.

    Each layer gets the largest common fraction of its full rank min(in, out) that fits, rounded down, at least 1, and
    never more than in * out / (in + out), where the factors would hold as much as the dense weight. What the rounding
    leaves goes out as one further rank each, to the layers that are nearest to their next rank, the first of equals.
    The model then holds at most `budget * total` parameters, and less than one rank of one layer below that, unless
    each layer has its highest rank.

    Args:
        shapes: (in_features, out_features) of each layer to convert by name; rank r costs r * (in + out) parameters.
        budget: share of `total` that may be left.
        total: parameters of the model now.
        other_params: those of them that stay: all but the weights of the layers in `shapes`.

    Raises:
        ValueError: where rank 1 everywhere is too much.
    """
    available = int(budget * total) - other_params
    highest = {name: max(1, a * b // (a + b)) for name, (a, b) in shapes.items()}

    def fractional(fraction: float) -> dict[str, float]:
        return {name: min(max(1.0, fraction * min(shape)), highest[name]) for name, shape in shapes.items()}

    def integral(fraction: float) -> dict[str, int]:
        return {name: int(rank) for name, rank in fractional(fraction).items()}

    def cost(ranks: Mapping[str, int]) -> int:
        return sum(rank * sum(shapes[name]) for name, rank in ranks.items())

    least = other_params + cost(integral(0.0))
    if least > other_params + available:
        raise ValueError(
            f"budget {budget}: of {total:,} parameters {least:,} ({least / total:.1%}) remain at rank 1, because "
            f"{other_params:,} lie outside the weights to convert: give a larger budget, or convert more layers"
        )
    if cost(integral(1.0)) <= available:
        return integral(1.0)
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(integral(middle)) <= available else (low, middle)
    ranks, goal = integral(low), fractional(low)
    left = available - cost(ranks)
    for name in sorted(shapes, key=lambda name: ranks[name] - goal[name]):
        price = sum(shapes[name])
        if ranks[name] < highest[name] and price <= left:
            ranks[name] += 1
            left -= price
    return ranks
