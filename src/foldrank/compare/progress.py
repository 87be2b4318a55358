"""Runs that have begun and have no record yet, from their logs."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from foldrank.structured import parse_json


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
    lines = []
    for file in sorted((study / "runs").glob("*/log.jsonl")):
        if file.parent.name not in done:
            entries = list(_entries(file))
            losses = [entry["loss"] for entry in entries if "loss" in entry]
            lines.append(
                Unfinished(
                    id=file.parent.name,
                    step=max((int(entry.get("step", 0)) for entry in entries), default=0),
                    loss=losses[-1] if losses else None,
                )
            )
    return tuple(lines)


def loss_at(log: Path, step: int) -> float | None:
    """The validation loss that a run's log has at a step."""
    entries = _entries(log) if log.exists() else []
    return next((entry["eval_loss"] for entry in entries if entry.get("step") == step and "eval_loss" in entry), None)


def _entries(file: Path) -> list[dict[str, float]]:
    entries = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entries.append(parse_json(line))
        except ValueError:
            break  # the last line, which is being written
    return entries
