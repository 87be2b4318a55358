"""Bounds of numbers, written at the field of a dataclass: `steps: Annotated[int, Bounds(1, 10**9)]`.

They are generous: what lies beyond is a slip of the keyboard or an attack, not a model that somebody trains.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args, get_type_hints


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a number, or each number of a list, must lie between."""

    least: float
    most: float
    above: bool = False
    """Whether `least` itself is too small."""

    def problem(self, name: str, value: float) -> str | None:
        """What is wrong with a value; None where nothing is."""
        if self.least <= value <= self.most and not (self.above and value == self.least):
            return None
        if value > self.most:
            return f"{name} must be at most {self.most:,}, got {value}"
        bound = f"a number above {self.least}" if self.above else f"at least {self.least}"
        return f"{name} must be {bound}, got {value}"


def out_of_bounds(config: object) -> list[str]:
    """What is wrong with the numbers of a dataclass, field by field. A field that is None has no bounds."""
    return [
        problem
        for name, bounds in _bounds(type(config)).items()
        for value in _numbers(getattr(config, name))
        if (problem := bounds.problem(name, value)) is not None
    ]


def _numbers(value: Any) -> Iterator[float]:
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, int | float) and not isinstance(number, bool):
            yield number


@cache
def _bounds(config: type) -> dict[str, Bounds]:
    hints = get_type_hints(config, include_extras=True)
    return {name: extra for name, hint in hints.items() for extra in get_args(hint) if isinstance(extra, Bounds)}
