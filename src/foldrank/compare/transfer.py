"""What the methods of a study are worth after fine-tuning: each final run's folded model, tuned with the run's seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from foldrank.compare.curves import Against
from foldrank.compare.records import Record
from foldrank.compare.statistics import Estimate, difference, estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """A method after one of the study's fine-tunings."""

    task: str
    """Name of the fine-tuning."""
    method: str
    before: Estimate
    """Held-out loss before any step; of a classification with a new head."""
    after: Estimate
    accuracy: Estimate | None
    """After, of a classification."""
    chance: float | None
    """The accuracy of always saying the commonest label."""
    against: tuple[Against, ...]
    """Paired differences of the held-out loss after it."""
    records: tuple[str, ...]


def transfers(finished: Mapping[str, Sequence[Record]], against: Mapping[str, Sequence[str]]) -> tuple[Transfer, ...]:
    """The fine-tunings of a table, task by task.

    Args:
        finished: final runs by method.
        against: the methods with which each is compared.
    """
    tasks = sorted({task for runs in finished.values() for run in runs for task in run.finetuned})
    return tuple(
        _transfer(task, method, finished, against.get(method, ()))
        for task in tasks
        for method, runs in finished.items()
        if any(run.tuned(task) for run in runs)
    )


def _transfer(task: str, method: str, finished: Mapping[str, Sequence[Record]], others: Sequence[str]) -> Transfer:
    runs = [run for run in finished[method] if run.tuned(task)]
    figures = [figures for run in runs if (figures := run.tuned(task))]
    accuracies = [each["after"]["accuracy"] for each in figures if "accuracy" in each["after"]]
    return Transfer(
        task=task,
        method=method,
        before=estimate([each["before"]["loss"] for each in figures]),
        after=estimate([each["after"]["loss"] for each in figures]),
        accuracy=estimate(accuracies) if accuracies else None,
        chance=figures[0]["after"].get("chance"),
        against=tuple(
            Against(method=other, difference=difference(_losses(runs, task), _losses(finished[other], task)))
            for other in others
            if other in finished
        ),
        records=tuple(run.id for run in runs),
    )


def _losses(runs: Sequence[Record], task: str) -> dict[int, float]:
    return {run.seed: figures["after"]["loss"] for run in runs if (figures := run.tuned(task))}
