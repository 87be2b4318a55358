"""Validation loss along the runs: over tokens, FLOPs and training time, and read off where budgets are equal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from foldrank.compare.records import Record
from foldrank.compare.statistics import Difference, Estimate, difference, estimate

Axis = Literal["tokens", "flops", "seconds"]
AXES: tuple[Axis, ...] = ("tokens", "flops", "seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A method at an evaluation that all its finished runs have."""

    tokens: float
    flops: float
    seconds: float | None
    """Mean over the runs; None where one was interrupted and resumed, so that its time is not known."""
    mean: float
    lowest: float
    """The lowest run."""
    highest: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Against:
    """A paired difference to another method."""

    method: str
    difference: Difference


@dataclass(frozen=True, kw_only=True, slots=True)
class AtBudget:
    """A method at an equal budget."""

    method: str
    loss: Estimate | None
    """Validation loss, interpolated on each run's curve; None where no run has evaluations on both sides."""
    fraction: float | None
    """How much of its runs that budget is: below 1 the learning rate had not come down yet."""
    matched: str | None
    """The method whose FLOPs it was trained for, from `flops_of`."""
    against: tuple[Against, ...]
    records: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """All methods at the smallest budget that every one of them reached."""

    axis: Axis
    value: float
    rows: tuple[AtBudget, ...]


def curve_of(runs: Sequence[Record]) -> tuple[Point, ...]:
    """The mean over runs at each step that all of them have."""
    histories = [{point.step: point for point in run.measured.history} for run in runs]
    if not histories:
        return ()
    points = []
    for step in sorted(set.intersection(*map(set, histories))):
        rows = [history[step] for history in histories]
        losses = [row.val_loss for row in rows]
        seconds = [row.seconds for row in rows if row.seconds is not None]
        tokens = sum(row.tokens for row in rows) / len(rows)
        points.append(
            Point(
                tokens=tokens,
                flops=runs[0].measured.flops_per_token * tokens,
                seconds=sum(seconds) / len(seconds) if len(seconds) == len(rows) else None,
                mean=sum(losses) / len(losses),
                lowest=min(losses),
                highest=max(losses),
            )
        )
    return tuple(points)


def equal_budget(
    axis: Axis,
    runs: Mapping[str, Sequence[Record]],
    against: Mapping[str, Sequence[str]],
    matched: Mapping[str, str],
) -> Budget | None:
    """The methods at the smallest budget that all of them reached; None with fewer than two, or where nothing is cut.

    Args:
        axis: what is equal.
        runs: finished final runs by method.
        against: methods with which each is compared.
        matched: of a method with `flops_of`, that method.
    """
    paths = {name: [(run, path) for run in group if (path := _path(run, axis))] for name, group in runs.items()}
    last_values = {name: [path[-1][0] for _, path in group] for name, group in paths.items() if group}
    if len(last_values) < 2:
        return None
    value = min(min(reached) for reached in last_values.values())
    if axis == "tokens" and all(end == value for reached in last_values.values() for end in reached):
        return None  # as the runs are: the table of quality says it
    losses: dict[str, dict[int, float]] = {}
    for name in last_values:
        read = {run.seed: _at(path, value) for run, path in paths[name]}
        losses[name] = {seed: loss for seed, loss in read.items() if loss is not None}
    rows = []
    for name, reached in last_values.items():
        curve = losses[name]
        pairs = [
            Against(method=other, difference=difference(curve, losses[other]))
            for other in against.get(name, ())
            if other in losses
        ]
        rows.append(
            AtBudget(
                method=name,
                loss=estimate(list(curve.values())) if curve else None,
                fraction=value / (sum(reached) / len(reached)),
                matched=matched.get(name),
                against=tuple(pairs),
                records=tuple(run.id for run in runs[name] if run.seed in curve),
            )
        )
    return Budget(axis=axis, value=value, rows=tuple(rows))


def _path(run: Record, axis: Axis) -> list[tuple[float, float]]:
    """(budget, loss) at each evaluation; empty where the times of a run are not known."""
    rows = run.measured.history
    if axis == "seconds":
        budgets = [row.seconds for row in rows]
    else:
        scale = run.measured.flops_per_token if axis == "flops" else 1
        budgets = [scale * row.tokens for row in rows]
    known = [budget for budget in budgets if budget is not None]
    if len(known) < len(budgets):
        return []
    return [(float(budget), row.val_loss) for budget, row in zip(known, rows, strict=True)]


def _at(path: Sequence[tuple[float, float]], value: float) -> float | None:
    """The loss at a budget, on the straight line between the two evaluations around it."""
    for budget, loss in path:
        if budget == value:
            return loss
    for (left, before), (right, after) in pairwise(path):
        if left < value < right:
            return before + (after - before) * (value - left) / (right - left)
    return None
