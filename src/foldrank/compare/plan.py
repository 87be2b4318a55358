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

    @property
    def id(self) -> str:
        """Name of its record and of its folder."""
        what = f"{self.corpus}-{self.size}-{self.method}-lr{self.learning_rate:.4g}-seed{self.seed}"
        return f"{what}-sweep" if self.stage == "sweep" else what


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The learning rate of a method, as far as the sweep has come."""

    rates: Sequence[float]
    """All rates that the sweep asks for so far, from small to large."""

    losses: Mapping[float, float]
    """Mean validation loss over the sweep's seeds, of the rates whose runs are all there; infinite where one failed."""

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
    """Runs of the whole study, if no sweep is extended."""
    return sum(
        len(study.seeds_of(method))
        + (len(study.sweep.learning_rates) * len(study.sweep.seeds) if study.has_sweep(size, method) else 0)
        for _, size, method in settings(study)
    )


def choice(study: Study, records: Mapping[str, Record], corpus: str, size: str, method: StudyMethod) -> Choice:
    """The learning rate with the lowest mean validation loss over the sweep's seeds, at the sweep's budget.

    While the best rate is the last at its end, one more beyond it is asked for, `extend` times at each end. Where the
    rate is that of another method or size, the choice is theirs.
    """
    size, method = study.sweep_of(size, method)
    sweep = study.sweep
    rates = sorted(sweep.learning_rates)
    more = {"low": sweep.extend, "high": sweep.extend}
    while True:
        known = {rate: _loss(study, records, corpus, size, method, rate) for rate in rates}
        losses = {rate: loss for rate, loss in known.items() if loss is not None}
        if len(losses) < len(rates):
            return Choice(rates=rates, losses=losses, best=None, best_at_boundary=False)
        best = min(rates, key=lambda rate: losses[rate])
        if losses[best] == math.inf:
            return Choice(rates=rates, losses=losses, best=None, best_at_boundary=False)
        if best == rates[-1] and more["high"]:
            more["high"] -= 1
            rates.append(_rounded(best * sweep.factor))
        elif best == rates[0] and more["low"]:
            more["low"] -= 1
            rates.insert(0, _rounded(best / sweep.factor))
        else:
            return Choice(rates=rates, losses=losses, best=best, best_at_boundary=best in (rates[0], rates[-1]))


def sweep_runs(study: Study, records: Mapping[str, Record], corpus: str, size: str, method: StudyMethod) -> list[Run]:
    """The runs of a method's sweep that the records so far ask for."""
    return [
        Run(corpus=corpus, size=size, method=method.name, stage="sweep", learning_rate=rate, seed=seed)
        for rate in choice(study, records, corpus, size, method).rates
        for seed in study.sweep.seeds
    ]


def recipe_of(study: Study, run: Run) -> Recipe:
    """All settings of a run."""
    recipe = study.recipe(run.corpus, run.size, study.method(run.method))
    train = replace(recipe.train, learning_rate=run.learning_rate)
    if run.stage == "sweep":
        # The test is for what is compared.
        train = replace(train, steps=study.sweep.steps or train.steps, test_tokens=None)
    return replace(recipe, train=train, seed=run.seed)


def _loss(
    study: Study, records: Mapping[str, Record], corpus: str, size: str, method: StudyMethod, rate: float
) -> float | None:
    losses = []
    for seed in study.sweep.seeds:
        run = Run(corpus=corpus, size=size, method=method.name, stage="sweep", learning_rate=rate, seed=seed)
        if run.id not in records:
            return None
        record = records[run.id]
        losses.append(record.measured.val_loss_folded if record.finished else math.inf)
    return math.fsum(losses) / len(losses)


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
