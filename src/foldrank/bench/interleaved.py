"""Rounds in which every subject has its turn, and what they come to beside the first."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from foldrank.bench.profiling import profiled

WARM_UP = 2
"""Turns of each subject before the first round."""

Turn = Callable[[], float]
"""Does a subject's work once and gives its seconds."""


def timed(run: Callable[[], object], device: str, prepare: Callable[[], object] = lambda: None) -> Turn:
    """A turn that takes the time of `run`, on a GPU until it has done everything; that of `prepare` not."""

    def turn() -> float:
        prepare()
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        return time.perf_counter() - began

    return turn


def synchronize(device: str) -> None:
    """Waits until a GPU has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved_timing(
    turns: Mapping[str, Turn], rounds: int, *, warm_up: int = WARM_UP, profile: bool = False
) -> dict[str, dict[str, Any]]:
    """Seconds of each subject, and round by round their ratio to the first one's.

    Each round begins with another subject, and goes through them backwards every other time, so that none always comes
    behind the same one.

    Returns:
        By subject: `seconds` (median), `ratio` (lower quartile, median, upper quartile), `ratio_of_the_fastest`, and
        `seconds_of_rounds`. With `profile` also `profile`, of one more turn behind all rounds.
    """
    names = list(turns)
    for _ in range(warm_up):
        for name in names:
            turns[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        order = names[first:] + names[:first]
        for name in order if (number // len(names)) % 2 == 0 else reversed(order):
            seconds[name].append(turns[name]())
    base = seconds[names[0]]
    return {
        name: {
            "seconds": statistics.median(own),
            "ratio": quartiles([a / b for a, b in zip(own, base, strict=True)]),
            "ratio_of_the_fastest": min(own) / min(base),
            "seconds_of_rounds": own,
            **({"profile": profiled(turns[name])} if profile else {}),
        }
        for name, own in seconds.items()
    }


def quartiles(numbers: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(numbers, n=4, method="inclusive")
