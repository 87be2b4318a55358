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
    stopped_at: int | None
    """Step at which it was stopped, as one of the worse half, and of which the loss is; None of whole runs."""
    records: tuple[str, ...]


def rates_tried(
    study: Study, records: Mapping[str, Record], corpus: str, size: str, method: StudyMethod
) -> tuple[Rate, ...]:
    """The rates of a method's own sweep so far, from small to large."""
    by_rate: dict[float, list[Record]] = {}
    stopped = choice(study, records, corpus, size, method).stopped
    for record in records.values():
        of_this = (record.corpus, record.size, record.method) == (corpus, size, method.name)
        stage = "rung" if record.learning_rate in stopped else "sweep"
        asked = (record.stage, record.until) == (stage, stopped.get(record.learning_rate))
        if of_this and asked and record.seed in study.sweep.seeds:
            by_rate.setdefault(record.learning_rate, []).append(record)
    rates = []
    for rate, runs in sorted(by_rate.items()):
        losses = [run.loss for run in runs if run.loss is not None and not failed(run)]
        rates.append(
            Rate(
                learning_rate=rate,
                loss=estimate(losses) if losses else None,
                failed=len(runs) - len(losses),
                stopped_at=stopped.get(rate),
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
    tried = sorted({*by_rate.rates, *by_rate.stopped})
    if len(tried) == 1:
        return "the only one tried"
    return "the smallest tried" if by_rate.best == tried[0] else "the largest tried"


def failed(record: Record) -> bool:
    """Whether a run did not come to its end, or to the step up to which it was to go, with losses that are numbers."""
    if record.stage == "rung":
        return record.loss is None or not math.isfinite(record.loss)
    return not usable(record)


def usable(record: Record) -> bool:
    """Whether a run finished with losses that are numbers."""
    if record.metrics is None:
        return False
    losses = (record.metrics.val_loss_folded, record.metrics.test_loss)
    return record.finished and all(loss is None or math.isfinite(loss) for loss in losses)
