"""What a sweep has tried, for the report; which rate is chosen is said by `plan.choice`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from foldrank.compare.plan import choice
from foldrank.compare.records import Record
from foldrank.compare.statistics import Estimate, estimate
from foldrank.compare.study import Study, StudyMethod


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """A learning rate that a sweep tried."""

    learning_rate: float
    loss: Estimate | None
    """Validation loss over the seeds that finished."""
    failed: int
    records: tuple[str, ...]


def rates_tried(
    study: Study, records: Mapping[str, Record], corpus: str, size: str, method: StudyMethod
) -> tuple[Rate, ...]:
    """The rates of a method's own sweep so far, from small to large."""
    by_rate: dict[float, list[Record]] = {}
    for record in records.values():
        asked = (record.corpus, record.size, record.method, record.stage) == (corpus, size, method.name, "sweep")
        if asked and record.seed in study.sweep.seeds:
            by_rate.setdefault(record.learning_rate, []).append(record)
    rates = []
    for rate, runs in sorted(by_rate.items()):
        losses = [run.measured.val_loss_folded for run in runs if usable(run)]
        rates.append(
            Rate(
                learning_rate=rate,
                loss=estimate(losses) if losses else None,
                failed=len(runs) - len(losses),
                records=tuple(run.id for run in runs),
            )
        )
    return tuple(rates)


def best_at_boundary(
    study: Study, records: Mapping[str, Record], corpus: str, size: str, method: StudyMethod
) -> str | None:
    """Why a better rate than the chosen one may lie outside those tried; None where it lies between two of them."""
    by_rate = choice(study, records, corpus, size, method)
    if not by_rate.best_at_boundary:
        return None
    if len(by_rate.rates) == 1:
        return "the only one tried"
    return "the smallest tried" if by_rate.best == by_rate.rates[0] else "the largest tried"


def usable(record: Record) -> bool:
    """Whether a run finished with losses that are numbers."""
    if record.metrics is None:
        return False
    losses = (record.metrics.val_loss_folded, record.metrics.test_loss)
    return record.finished and all(loss is None or math.isfinite(loss) for loss in losses)
