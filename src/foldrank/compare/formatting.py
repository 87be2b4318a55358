"""Numbers as text, the same in the summary, the tables and the descriptions of charts."""

from collections.abc import Callable

from foldrank.compare.statistics import Estimate
from foldrank.report.formatting import (
    MINUS,
    NONE,
    count,
    loss,
    mebibytes,
    percent,
    perplexity,
    rate,
    ratio,
    seconds,
    short,
    signed,
)

__all__ = [
    "MINUS",
    "NONE",
    "count",
    "difference",
    "loss",
    "mebibytes",
    "percent",
    "perplexity",
    "rate",
    "ratio",
    "seconds",
    "seeds",
    "short",
    "signed",
    "span",
]


def span(estimate: Estimate | None, text: Callable[[float], str] = signed) -> str:
    """An interval."""
    if estimate is None or estimate.ci_low is None or estimate.ci_high is None:
        return NONE
    return f"{text(estimate.ci_low)} to {text(estimate.ci_high)}"


def seeds(value: int) -> str:
    """So many seeds."""
    return "1 seed" if value == 1 else f"{value} seeds"


def difference(estimate: Estimate) -> str:
    """A difference with its interval and what it rests on."""
    interval = "no interval" if estimate.ci_low is None else f"95 % interval {span(estimate)}"
    return f"{signed(estimate.mean)}, {interval}, {seeds(estimate.seeds)}"
