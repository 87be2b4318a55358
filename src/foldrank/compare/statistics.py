"""Means over seeds with 95 % intervals, and differences paired by seed, by Student's t."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.stats import t as student

LEVEL = 0.95
"""Share of such intervals that hold the true mean, where the seeds' values are normally distributed."""

Verdict = Literal["lower", "higher", "no difference shown", "too few seeds"]
"""What an interval of a difference says: below zero, above zero, holds zero, or there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over seeds. With one seed it has no spread and no interval."""

    seeds: int
    mean: float
    sd: float | None
    """Standard deviation of the values, with n - 1."""
    ci_low: float | None
    """Lower end of the 95 % interval of the mean."""
    ci_high: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A method's values less those of another, seed by seed."""

    estimate: Estimate | None
    """None where no seed is in both."""
    verdict: Verdict


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard deviation s and interval: mean +- t(0.975, n - 1) s / sqrt(n).

    Raises:
        ValueError: for no values, or one that is not finite.

    >>> found = estimate([1.0, 2.0, 3.0])
    >>> found.mean, found.sd, round(found.ci_low, 3), round(found.ci_high, 3)
    (2.0, 1.0, -0.484, 4.484)
    """
    count = len(values)
    if not count or not all(map(math.isfinite, values)):
        raise ValueError(f"a mean needs at least one value, each finite, got {list(values)}")
    mean = math.fsum(values) / count
    if count < 2:
        return Estimate(seeds=count, mean=mean, sd=None, ci_low=None, ci_high=None)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(student.ppf((1 + LEVEL) / 2, count - 1)) * sd / math.sqrt(count)
    return Estimate(seeds=count, mean=mean, sd=sd, ci_low=mean - half, ci_high=mean + half)


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """The difference ours - theirs over the seeds that are in both.

    Pairing takes out what a seed does to both: the same initial embedding and the same order of the data.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return Difference(estimate=None, verdict="too few seeds")
    paired = estimate([ours[seed] - theirs[seed] for seed in seeds])
    return Difference(estimate=paired, verdict=verdict(paired))


def verdict(paired: Estimate) -> Verdict:
    """What the interval of a difference says in words."""
    if paired.ci_low is None or paired.ci_high is None:
        return "too few seeds"
    if paired.ci_high < 0:
        return "lower"
    return "higher" if paired.ci_low > 0 else "no difference shown"
