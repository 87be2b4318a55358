"""What a study runs next: a function of the study and of the records that there are, and of nothing else."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from foldrank.compare.records import Record, Stage
from foldrank.compare.study import Study, StudyMethod
from foldrank.recipes.schema import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run of a study."""

    corpus: str
    size: str
    method: str
    stage: Stage
    learning_rate: float
    seed: int
    until: int | None = None
    """Step up to which a rung goes."""

    @property
    def id(self) -> str:
        """Name of its record."""
        return self.folder if self.until is None else f"{self.folder}-step{self.until}"

    @property
    def folder(self) -> str:
        """Name of its folder, which rungs share with the whole run."""
        what = f"{self.corpus}-{self.size}-{self.method}-lr{self.learning_rate:.4g}-seed{self.seed}"
        return what if self.stage == "final" else f"{what}-sweep"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The learning rate of a method, as far as the sweep has come."""

    rates: Sequence[float]
    """All rates that the sweep asks for whole runs of so far, from small to large."""

    losses: Mapping[float, float]
    """Mean validation loss over the sweep's seeds, of the rates whose whole runs are all there; infinite where one
    failed."""

    stopped: Mapping[float, int]
    """From a rate that was stopped early to the step."""

    rungs: Sequence[tuple[float, int]]
    """Rates and steps of the runs up to a step that the sweep asks for so far."""

    best: float | None
    """The rate with the lowest loss; None while the sweep goes on, and where every rate failed."""

    best_at_boundary: bool
    """Whether the best one is the smallest or largest tried, so that a better one may lie beyond."""


def planned(study: Study, records: Mapping[str, Record]) -> list[Run]:
    """The runs that can be run now and have no record yet, in their order: those of a sweep before what it decides."""
    return [run for run in expected(study, records) if run.id not in records]


def expected(study: Study, records: Mapping[str, Record]) -> list[Run]:
    """All runs that the records so far ask for, those that are there included, in the order of running."""
    runs: list[Run] = []
    for corpus, size, method in settings(study):
        if study.has_sweep(size, method):
            runs += sweep_runs(study, records, corpus, size, method)
        chosen = choice(study, records, corpus, size, method).best
        if chosen is not None:
            runs += [
                Run(corpus=corpus, size=size, method=method.name, stage="final", learning_rate=chosen, seed=seed)
                for seed in study.seeds_of(method)
            ]
    return runs


def settings(study: Study) -> list[tuple[str, str, StudyMethod]]:
    """Corpus, size and method of all comparisons, in the order of running."""
    return [
        (corpus, size, method)
        for method in study.methods
        for size in study.sizes
        for corpus in study.corpora_of(method)
    ]


def total(study: Study) -> int:
    """Runs of the whole study that are not stopped early, if no sweep is extended."""
    sweep = study.sweep.rates_left()[-1] * len(study.sweep.seeds)
    return sum(
        len(study.seeds_of(method)) + (sweep if study.has_sweep(size, method) else 0)
        for _, size, method in settings(study)
    )


def choice(study: Study, records: Mapping[str, Record], corpus: str, size: str, method: StudyMethod) -> Choice:
    """The learning rate with the lowest mean validation loss over the sweep's seeds, at the sweep's budget.

    While the best rate is the last at its end, one more beyond it is asked for, `extend` times at each end. Where the
    rate is that of another method or size, the choice is theirs.
    """
    size, method = study.sweep_of(size, method)
    sweep = study.sweep
    more = {"low": sweep.extend, "high": sweep.extend}
    tried = sorted(sweep.learning_rates)
    rates, losses, stopped, rungs, pending = list(tried), {}, {}, [], False
    for step in _rung_steps(study, corpus, size, method):
        rungs += [(rate, step) for rate in rates]
        at_step = {rate: _loss(study, records, corpus, size, method, rate, step) for rate in rates}
        if pending := None in at_step.values():
            break
        better = sorted(rates, key=lambda rate: (at_step[rate], rate))[: math.ceil(len(rates) / 2)]
        stopped |= {rate: step for rate in rates if rate not in better}
        rates = sorted(better)
    while not pending:
        known = {rate: _loss(study, records, corpus, size, method, rate) for rate in rates}
        losses = {rate: loss for rate, loss in known.items() if loss is not None}
        if len(losses) < len(rates):
            break
        best = min(rates, key=lambda rate: losses[rate])
        if losses[best] == math.inf:
            break
        if best == tried[-1] and more["high"]:
            more["high"] -= 1
            tried.append(_rounded(best * sweep.factor))
            rates.append(tried[-1])
        elif best == tried[0] and more["low"]:
            more["low"] -= 1
            tried.insert(0, _rounded(best / sweep.factor))
            rates.insert(0, tried[0])
        else:
            return Choice(
                rates=rates,
                losses=losses,
                stopped=stopped,
                rungs=rungs,
                best=best,
                best_at_boundary=best in (tried[0], tried[-1]),
            )
    whole = [] if pending else rates
    return Choice(rates=whole, losses=losses, stopped=stopped, rungs=rungs, best=None, best_at_boundary=False)


def sweep_runs(study: Study, records: Mapping[str, Record], corpus: str, size: str, method: StudyMethod) -> list[Run]:
    """The runs of a method's sweep that the records so far ask for."""
    chosen = choice(study, records, corpus, size, method)
    asked = [*chosen.rungs, *((rate, None) for rate in chosen.rates)]
    return [_sweep_run(corpus, size, method, rate, seed, step) for rate, step in asked for seed in study.sweep.seeds]


def stopped_folders(study: Study, records: Mapping[str, Record]) -> list[str]:
    """The folders of runs that were stopped early, which are of no more use."""
    return [
        _sweep_run(corpus, size, method, rate, seed, None).folder
        for corpus, size, method in settings(study)
        if study.has_sweep(size, method)
        for rate in choice(study, records, corpus, size, method).stopped
        for seed in study.sweep.seeds
    ]


def _sweep_run(corpus: str, size: str, method: StudyMethod, rate: float, seed: int, until: int | None) -> Run:
    return Run(
        corpus=corpus,
        size=size,
        method=method.name,
        stage="sweep" if until is None else "rung",
        learning_rate=rate,
        seed=seed,
        until=until,
    )


def _rung_steps(study: Study, corpus: str, size: str, method: StudyMethod) -> list[int]:
    """The steps of a sweep's runs at which the worse half stops."""
    if not study.sweep.halve_at:
        return []
    steps = study.sweep.steps or study.recipe(corpus, size, method).train.steps
    return [max(1, min(round(share * steps), steps - 1)) for share in study.sweep.halve_at]


def recipe_of(study: Study, run: Run) -> Recipe:
    """All settings of a run."""
    recipe = study.recipe(run.corpus, run.size, study.method(run.method))
    train = replace(recipe.train, learning_rate=run.learning_rate)
    if run.stage != "final":
        # The test is for what is compared.
        train = replace(train, steps=study.sweep.steps or train.steps, test_tokens=None)
    return replace(recipe, train=train, seed=run.seed)


def _loss(
    study: Study,
    records: Mapping[str, Record],
    corpus: str,
    size: str,
    method: StudyMethod,
    rate: float,
    until: int | None = None,
) -> float | None:
    """The mean over the sweep's seeds, of whole runs or up to a step; None while some are to do, infinite of failed."""
    losses = []
    for seed in study.sweep.seeds:
        run = _sweep_run(corpus, size, method, rate, seed, until)
        if run.id not in records:
            return None
        loss = records[run.id].loss
        losses.append(math.inf if loss is None else loss)
    return math.fsum(losses) / len(losses)


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
