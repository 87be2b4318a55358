"""From a study and its records to everything that a report shows: one frozen tree of plain data."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from foldrank.compare.curves import AXES, Against, Budget, Point, curve_of, equal_budget
from foldrank.compare.effective_rank import Spectrum, spectrum
from foldrank.compare.learning_rate_sweep import Rate, best_at_boundary, failed, rates_tried, usable
from foldrank.compare.method_cost import Costs, costs_of, dense_parameters
from foldrank.compare.plan import choice, settings
from foldrank.compare.progress import Unfinished, unfinished_runs
from foldrank.compare.records import Record, read_records
from foldrank.compare.statistics import Estimate, difference, estimate
from foldrank.compare.study import Study, StudyMethod
from foldrank.compare.study_file import load_study
from foldrank.compare.transfer import Transfer, transfers
from foldrank.recipes.methods import Method
from foldrank.train.metrics import RunMetrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """What folding changed: the worst over the final runs."""

    layers: Mapping[str, float]
    """Largest rounding of a weight, by layer."""
    logit: float
    """Largest change of a logit."""
    agreement: float
    """Smallest share of positions with the same next token before and after."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A method on one corpus, at one size."""

    method: str
    kind: Method
    dlr: bool
    """Whether it trains with the residual; an ablation does not."""
    reference: bool
    """Of another group: shown because methods of this one are compared with it."""
    learning_rate: float | None
    """Of the final runs; None while the sweep is not done."""
    learning_rate_of: str | None
    """Method or size by whose sweep the rate was chosen; None: by its own."""
    best_at_boundary: str | None
    """Why a better rate may lie outside those tried."""
    finished: int
    failed: int
    missing: tuple[int, ...]
    """Seeds whose final run is still to do."""
    other_rate: int
    """Final runs left out because they had another learning rate than the chosen one."""
    validation: Estimate | None
    test: Estimate | None
    against: tuple[Against, ...]
    """Paired differences of the test loss."""
    costs: Costs | None
    curve: tuple[Point, ...]
    rates: tuple[Rate, ...]
    drift: Drift | None
    sample: str | None
    """Written by the folded model of the first seed."""
    records: tuple[str, ...]
    """The final runs of which the losses are means."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Methods that are compared with each other: one group on one corpus, at one size."""

    corpus: str
    size: str
    group: str
    rows: tuple[Row, ...]
    budgets: tuple[Budget, ...]
    spectra: tuple[Spectrum, ...]
    transfers: tuple[Transfer, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A run that failed, or a fine-tuning of one."""

    id: str
    corpus: str
    size: str
    method: str
    stage: str
    learning_rate: float
    seed: int
    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """Everything that a report shows."""

    title: str
    question: str
    final_records_expected: int
    final_records_done: int
    """Final runs with a record, failed ones included."""
    sweeps_done: int
    comparisons: int
    """Intervals of a difference in all tables."""
    seeds: tuple[int, ...]
    sweep_seeds: tuple[int, ...]
    tables: tuple[Table, ...]
    failures: tuple[Failure, ...]
    orphaned_records: tuple[str, ...]
    """Records of what the study does not name (any more); in no table."""
    unfinished: tuple[Unfinished, ...]
    made_with: Mapping[str, tuple[str, ...]]
    """Devices, threads, versions and commits of the runs."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def analyse(study: Study, records: Mapping[str, Record], unfinished: Sequence[Unfinished] = ()) -> Analysis:
    """Makes every table of a report. Nothing is read but the arguments."""
    tables = tuple(
        _table(study, records, corpus, size, group)
        for corpus in study.corpora
        for size in study.sizes
        for group in dict.fromkeys(method.group for method in study.methods if corpus in study.corpora_of(method))
    )
    known = {run.id: run for run in records.values() if _asked(study, run)}
    expected = sum(len(study.seeds_of(method)) for _, _, method in settings(study))
    missing = sum(len(row.missing) for table in tables for row in table.rows if not row.reference)
    return Analysis(
        title=study.title,
        question=study.question,
        final_records_expected=expected,
        final_records_done=expected - missing,
        sweeps_done=sum(run.stage == "sweep" for run in known.values()),
        comparisons=sum(pair.difference.verdict != "too few seeds" for table in tables for pair in _pairs_of(table)),
        seeds=tuple(study.seeds),
        sweep_seeds=tuple(study.sweep.seeds),
        tables=tables,
        failures=tuple(failure for run in known.values() for failure in _failures(run)),
        orphaned_records=tuple(name for name in records if name not in known),
        unfinished=tuple(unfinished),
        made_with=_made_with(known.values()),
    )


def analyse_folder(folder: Path) -> Analysis:
    """What a study's folder shows, finished or not.

    Raises:
        ValueError: where it is no folder of a study, or holds a file that is no record.
    """
    if not (folder / "study.yaml").is_file():
        raise ValueError(f"{folder} is no folder of a study: it has no study.yaml (foldrank compare makes one)")
    records = read_records(folder)
    return analyse(load_study(folder / "study.yaml"), records, unfinished_runs(folder, records))


def _table(study: Study, records: Mapping[str, Record], corpus: str, size: str, group: str) -> Table:
    members = [method for method in study.methods if method.group == group and corpus in study.corpora_of(method)]
    against = {method.name: study.against(method) for method in members}
    named = {*against, *(other for others in against.values() for other in others)}
    shown = [method for method in study.methods if method.name in named and corpus in study.corpora_of(method)]
    final_records = {method.name: _final_records(study, records, corpus, size, method) for method in shown}
    finished = {name: [run for run in runs if usable(run)] for name, runs in final_records.items()}
    test = {name: _by_seed(runs, lambda metrics: metrics.test_loss) for name, runs in finished.items()}
    dense = dense_parameters(study, records, corpus, size)
    rows = []
    for method in shown:
        of_method = (study, records, corpus, size, method)
        runs, begun = finished[method.name], final_records[method.name]
        recipe, rate = study.recipe(corpus, size, method), choice(*of_method).best
        if rate is not None:
            recipe = replace(recipe, train=replace(recipe.train, learning_rate=rate))
        every = [run for run in records.values() if _group_of(run) == (corpus, size, method.name)]
        rows.append(
            Row(
                method=method.name,
                kind=method.parsed_kind(),
                dlr=method.parsed_kind().residual and method.settings.get("train.ablation") is None,
                reference=method.name not in against,
                learning_rate=rate,
                learning_rate_of=method.learning_rate_of or study.sizes[size].learning_rates_of,
                best_at_boundary=best_at_boundary(*of_method),
                finished=len(runs),
                failed=len(begun) - len(runs),
                missing=tuple(seed for seed in study.seeds_of(method) if seed not in {run.seed for run in begun}),
                other_rate=sum(run.stage == "final" for run in every) - len(begun),
                validation=_estimate(_by_seed(runs, lambda metrics: metrics.val_loss_folded)),
                test=_estimate(test[method.name]),
                against=tuple(
                    Against(method=other, difference=difference(test[method.name], test[other]))
                    for other in against.get(method.name, ())
                    if other in test
                ),
                costs=costs_of(recipe, runs or [run for run in every if usable(run)], dense),
                curve=curve_of(runs),
                rates=rates_tried(*of_method),
                drift=_drift(runs),
                sample=_printable(runs[0].measured.sample) if runs else None,
                records=tuple(run.id for run in runs),
            )
        )
    matched = {method.name: method.flops_of for method in shown if method.flops_of is not None}
    budgets = (equal_budget(axis, finished, against, matched) for axis in AXES)
    return Table(
        corpus=corpus,
        size=size,
        group=group,
        rows=tuple(rows),
        budgets=tuple(budget for budget in budgets if budget is not None),
        spectra=_spectra(finished),
        transfers=transfers(finished, against),
    )


def _final_records(
    study: Study, records: Mapping[str, Record], corpus: str, size: str, method: StudyMethod
) -> list[Record]:
    """The final runs of a method at its chosen learning rate, in the order of their seeds."""
    chosen = choice(study, records, corpus, size, method).best
    found = [
        run
        for run in records.values()
        if _group_of(run) == (corpus, size, method.name)
        and (run.stage, run.learning_rate) == ("final", chosen)
        and run.seed in study.seeds_of(method)
    ]
    return sorted(found, key=lambda run: run.seed)


def _group_of(run: Record) -> tuple[str, str, str]:
    return run.corpus, run.size, run.method


def _asked(study: Study, run: Record) -> bool:
    method = next((method for method in study.methods if method.name == run.method), None)
    return method is not None and run.corpus in study.corpora_of(method) and run.size in study.sizes


def _drift(runs: Sequence[Record]) -> Drift | None:
    layers: dict[str, float] = {}
    for run in runs:
        for layer, rounding in run.measured.fold_weight_rounding.items():
            layers[layer] = max(rounding, layers.get(layer, 0.0))
    if not layers:
        return None
    return Drift(
        layers=dict(sorted(layers.items(), key=lambda entry: _natural(entry[0]))),
        logit=max(run.measured.fold_max_abs_logit_drift for run in runs),
        agreement=min(run.measured.fold_argmax_agreement for run in runs),
    )


def _spectra(runs: Mapping[str, Sequence[Record]]) -> tuple[Spectrum, ...]:
    found = [
        spectrum(layer, name, values)
        for name, group in runs.items()
        for run in [run for run in group if run.spectra][:1]
        for layer, values in run.spectra.items()
        if values
    ]
    return tuple(sorted(found, key=lambda entry: _natural(entry.layer)))


def _failures(run: Record) -> Iterator[Failure]:
    """Of a run, and of its fine-tunings."""
    errors = {run.stage: run.error or "it finished with a loss that is not a number"} if failed(run) else {}
    errors |= {f"fine-tuned: {name}": each["error"] for name, each in run.finetuned.items() if "error" in each}
    for stage, error in errors.items():
        yield Failure(
            id=run.id,
            corpus=run.corpus,
            size=run.size,
            method=run.method,
            stage=stage,
            learning_rate=run.learning_rate,
            seed=run.seed,
            error=_printable(error),
        )


def _pairs_of(table: Table) -> Iterable[Against]:
    for row in (*table.rows, *(row for budget in table.budgets for row in budget.rows)):
        yield from row.against


def _made_with(runs: Iterable[Record]) -> dict[str, tuple[str, ...]]:
    found: dict[str, set[str]] = {}
    for run in runs:
        if run.finished:
            metrics = run.measured
            about = {"device": metrics.device, "threads": metrics.threads, "commit": metrics.commit}
            for name, value in {**about, **metrics.versions}.items():
                found.setdefault(name, set()).add(str(value))
    return {name: tuple(sorted(values)) for name, values in found.items()}


def _by_seed(runs: Sequence[Record], loss_of: Callable[[RunMetrics], float | None]) -> dict[int, float]:
    losses = {run.seed: loss_of(run.measured) for run in runs}
    return {seed: loss for seed, loss in losses.items() if loss is not None}


def _estimate(values: Mapping[int, float]) -> Estimate | None:
    return estimate(list(values.values())) if values else None


def _natural(name: str) -> list[Any]:
    """So that layer 10 comes behind layer 2."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _printable(text: str) -> str:
    """Text that can be written and shown: of a model, it may be anything."""
    text = text.encode("utf-8", "replace").decode()
    return "".join(sign if sign in "\n\t" or sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)
