"""The next token from logits."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a token is chosen.

    Raises:
        ValueError: naming every field that is out of range.

    Example:
        >>> Sampling(temperature=0.7, top_k=40).top_k
        40
    """

    temperature: float = 0.7
    """By which logits are divided; 0 takes the likeliest token."""
    top_k: int | None = 50
    """Only so many of the likeliest tokens are drawn from; None: all."""
    top_p: float | None = None
    """Only the likeliest tokens whose probabilities together reach it are drawn from; None: all."""

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < np.inf:
            problems.append(f"temperature must be a number of at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p must lie in (0, 1], got {self.top_p}")
        if problems:
            raise ValueError("; ".join(problems))


def next_tokens(logits: NDArray, sampling: Sampling, random: Generator) -> NDArray:
    """One token for each row.

    Shape:
        logits (batch, vocabulary), result (batch,).
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return np.array([_draw(row, sampling, random) for row in logits])


def _draw(logits: NDArray, sampling: Sampling, random: Generator) -> int:
    count = min(sampling.top_k or len(logits), len(logits))
    kept = np.argpartition(logits, -count)[-count:]
    kept = kept[np.argsort(-logits[kept], kind="stable")]
    scaled = logits[kept].astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled[0])
    weights /= weights.sum()
    if sampling.top_p is not None:
        # At least the likeliest; the token that reaches the sum counts.
        reached = int(np.searchsorted(weights.cumsum(), sampling.top_p)) + 1
        kept, weights = kept[:reached], weights[:reached] / weights[:reached].sum()
    return int(random.choice(kept, p=weights))
