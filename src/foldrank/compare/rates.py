"""Which learning rate each method gets: the one with the lowest mean validation loss over the sweep's seeds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from foldrank.compare.records import Record
from foldrank.compare.statistics import Estimate, estimate
from foldrank.compare.study import Method, Study


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """A learning rate that a sweep tried."""

    learning_rate: float
    loss: Estimate | None
    """Validation loss over the seeds that finished."""
    failed: int
    complete: bool
    """Every seed of the sweep finished: only such a rate can be chosen."""
    records: tuple[str, ...]


def rates_tried(
    study: Study, records: Mapping[str, Record], corpus: str, size: str, method: Method
) -> tuple[Rate, ...]:
    """The rates of a method's own sweep so far, from small to large."""
    found: dict[float, list[Record]] = {}
    for record in records.values():
        if (record.corpus, record.size, record.method, record.stage) == (corpus, size, method.name, "sweep"):
            found.setdefault(record.learning_rate, []).append(record)
    rates = []
    for rate, runs in sorted(found.items()):
        losses = {run.seed: run.metrics["val_loss"] for run in runs if usable(run)}
        rates.append(
            Rate(
                learning_rate=rate,
                loss=estimate(list(losses.values())) if losses else None,
                failed=sum(not usable(run) for run in runs),
                complete=set(study.sweep.seeds) <= losses.keys(),
                records=tuple(run.id for run in runs),
            )
        )
    return tuple(rates)


def chosen_rate(study: Study, records: Mapping[str, Record], corpus: str, size: str, method: Method) -> float | None:
    """The rate of a method's final runs; None while its sweep is not done, or where every rate failed."""
    if method.learning_rate_of is not None:
        return chosen_rate(study, records, corpus, size, study.method(method.learning_rate_of))
    rates = rates_tried(study, records, corpus, size, method)
    done = [rate.learning_rate for rate in rates if rate.complete or rate.failed]
    if any(not any(math.isclose(wanted, rate) for rate in done) for wanted in study.sweep.learning_rates):
        return None
    losses = {rate.learning_rate: rate.loss.mean for rate in rates if rate.complete and rate.loss is not None}
    return min(losses, key=lambda rate: losses[rate]) if losses else None


def at_end(rates: tuple[Rate, ...], chosen: float | None) -> str | None:
    """Why a better rate than the chosen one may lie outside those tried; None where it lies between two of them."""
    tried = [rate.learning_rate for rate in rates]
    if chosen not in tried:
        return None
    if len(tried) == 1:
        return "the only one tried"
    return {0: "the smallest tried", len(tried) - 1: "the largest tried"}.get(tried.index(chosen))


def usable(record: Record) -> bool:
    """Whether a run finished with losses that are numbers."""
    losses = [record.metrics.get("val_loss", math.nan), record.metrics.get("test_loss", 0.0)]
    return record.finished and all(map(math.isfinite, losses))
