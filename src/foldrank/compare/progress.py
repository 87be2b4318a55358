"""Runs that have begun and have no record yet, from their logs."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from foldrank.runs.log import read_log


@dataclass(frozen=True, kw_only=True, slots=True)
class Unfinished:
    """A run that trains, or was stopped."""

    id: str
    step: int
    """Of the last entry of its log; 0 before the first."""
    loss: float | None
    """Training loss there."""


def unfinished_runs(study: Path, done: Collection[str]) -> tuple[Unfinished, ...]:
    """The runs in a study's folder that have a log and no record."""
    unfinished = []
    for file in sorted((study / "runs").glob("*/log.jsonl")):
        if file.parent.name not in done:
            log = read_log(file)
            loss = log.points[-1].loss if log.points else None
            unfinished.append(Unfinished(id=file.parent.name, step=log.step, loss=loss))
    return tuple(unfinished)


def loss_at(log: Path, step: int) -> float | None:
    """The validation loss that a run's log has at a step."""
    return next((each.loss for each in read_log(log).evaluations if each.step == step), None)
