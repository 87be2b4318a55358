"""Interleaved timing: rounds in which every method runs once, and their ratios to the first."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from foldrank.bench.profiling import profiled

WARM_UP = 2
"""Runs of each method before the first round."""

Timer = Callable[[], float]
"""Does a method's work once and gives its seconds."""


def timed(run: Callable[[], object], device: str, prepare: Callable[[], object] = lambda: None) -> Timer:
    """A timer of `run`, on a GPU until it has done everything; that of `prepare` not."""

    def timer() -> float:
        prepare()
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        return time.perf_counter() - began

    return timer


def synchronize(device: str) -> None:
    """Waits until a GPU has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved_timing(
    timers: Mapping[str, Timer], rounds: int, *, warm_up: int = WARM_UP, profile: bool = False
) -> dict[str, dict[str, Any]]:
    """Seconds of each method, and round by round their ratio to the first one's.

    Each round begins with another method, and goes through them backwards every other time, so that none always comes
    behind the same one.

    Returns:
        By method: `seconds` (median), `ratio` (lower quartile, median, upper quartile), `ratio_of_the_fastest`, and
        `seconds_of_rounds`. With `profile` also `profile`, of one more run after all rounds.
    """
    names = list(timers)
    for _ in range(warm_up):
        for name in names:
            timers[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        order = names[first:] + names[:first]
        for name in order if (number // len(names)) % 2 == 0 else reversed(order):
            seconds[name].append(timers[name]())
    base = seconds[names[0]]
    return {
        name: {
            "seconds": statistics.median(times),
            "ratio": quartiles([a / b for a, b in zip(times, base, strict=True)]),
            "ratio_of_the_fastest": min(times) / min(base),
            "seconds_of_rounds": times,
            **({"profile": profiled(timers[name])} if profile else {}),
        }
        for name, times in seconds.items()
    }


def quartiles(numbers: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(numbers, n=4, method="inclusive")
