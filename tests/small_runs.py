"""What a finished run is to the tests."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMALL_MODEL = {
    "model.hidden_size": 32,
    "model.intermediate_size": 50,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "low_rank.rank": 7,
    "sample_tokens": 4,
}
"""Settings of a model that trains in no time; the rank divides no width."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of `foldrank pretrain` from beginning to end. Tests read its folder and change nothing in it."""

    recipe: Path
    out: Path
    stdout: str
    stderr: str
    metrics: dict[str, Any]


def without_clock(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a run that must be equal when it is run again."""
    kept = {name: value for name, value in metrics.items() if name not in ("seconds", "tokens_per_second")}
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in metrics["history"]]
    return {**kept, "history": rows}
