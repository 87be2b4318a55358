"""The part of a report on one table of methods, from quality to samples."""

from foldrank.compare import formatting
from foldrank.compare.analysis import Row, Table
from foldrank.compare.curves import Budget
from foldrank.compare.formatting import NONE
from foldrank.compare.learning_rate_sweep import Rate
from foldrank.compare.report import charts, prose
from foldrank.compare.report.cells import PAIR_COLUMNS, pair_cells, sources
from foldrank.compare.report.transfer import transfer_blocks
from foldrank.compare.statistics import Estimate
from foldrank.compare.summary import heading
from foldrank.report.blocks import Block, Chart, Points, Sample, Section, Text, grid

AXES = {
    "tokens": ("Equal tokens", "training tokens", formatting.short),
    "flops": ("Equal FLOPs", "training FLOPs", formatting.short),
    "seconds": ("Equal training time", "seconds of training", formatting.seconds),
}


def table_section(table: Table, position: int) -> Section:
    """All about one table."""
    where = f"t{position}"
    names = ", ".join(row.method for row in table.rows if row.reference)
    others = prose.REFERENCE.format(names=names) if names else ""
    parts = [
        Section(id=f"{where}-quality-part", title="Quality", blocks=_quality(table, where)),
        Section(id=f"{where}-cost-part", title="Cost", blocks=_cost(table, where)),
        Section(id=f"{where}-equal-part", title="Equal budgets", blocks=_budgets(table, where)),
        Section(id=f"{where}-rates-part", title="Learning rates", blocks=_rates(table, where)),
        Section(id=f"{where}-drift-part", title="What the fold changed", blocks=_drift(table, where)),
        Section(id=f"{where}-spectra-part", title="Spectra", blocks=_spectra(table, where)),
        Section(id=f"{where}-transfer-part", title="After fine-tuning", blocks=transfer_blocks(table, where)),
        Section(id=f"{where}-samples-part", title="Samples", blocks=_samples(table)),
    ]
    return Section(
        id=where,
        title=heading(table),
        blocks=[
            Text(text=f"Corpus {table.corpus}, size {table.size}, group {table.group}.{' ' * bool(others)}{others}")
        ],
        parts=[part for part in parts if part.blocks],
    )


def _quality(table: Table, where: str) -> list[Block]:
    rows = [
        (
            row.method,
            _rate(row),
            *_reach(row),
            _seeds(row),
            *_loss(row.validation),
            *_loss(row.test),
            *_perplexity(row.test),
            sources(row.records),
        )
        for row in table.rows
    ]
    notes = [
        f"{row.method}: the rate {formatting.rate(row.learning_rate)} is {row.best_at_boundary}; a better one may lie "
        "beyond."
        for row in table.rows
        if row.best_at_boundary is not None and row.learning_rate is not None
    ]
    notes += [
        f"{row.method}: {row.other_rate} final runs had another learning rate or seed than now chosen and are left out."
        for row in table.rows
        if row.other_rate
    ]
    blocks: list[Block] = [
        Text(text=prose.QUALITY),
        grid(
            f"{where}-quality-table",
            f"Loss of each method, {heading(table)}",
            "Method|Learning rate>|Movement>|Tokens per parameter>|Seeds>|Validation loss>|95 % interval>|Test loss>"
            "|95 % interval>|Test perplexity>|95 % interval>|Records",
            rows,
        ),
    ]
    if notes:
        blocks.append(Points(items=notes))
    pairs = [pair_cells(row.method, pair) for row in table.rows for pair in row.against]
    if pairs:
        blocks += [
            Text(text=prose.DIFFERENCES),
            grid(
                f"{where}-difference-table",
                f"Paired differences of the test loss, {heading(table)}",
                PAIR_COLUMNS,
                pairs,
            ),
        ]
    blocks += _blocks_of(charts.differences(table, where))
    return blocks


def _cost(table: Table, where: str) -> list[Block]:
    rows = [
        (
            row.method,
            row.costs.rank or NONE,
            formatting.count(row.costs.parameters),
            NONE if row.costs.parameters_blocks is None else formatting.count(row.costs.parameters_blocks),
            formatting.percent(row.costs.parameters_fraction),
            formatting.short(row.costs.flops_per_token),
            formatting.mebibytes(sum(row.costs.memory.values())),
            NONE if row.costs.tokens is None else formatting.short(row.costs.tokens),
            NONE if row.costs.flops is None else formatting.short(row.costs.flops),
            NONE if row.costs.tokens_per_second is None else formatting.count(row.costs.tokens_per_second),
            sources(row.costs.records),
        )
        for row in table.rows
        if row.costs is not None
    ]
    if not rows:
        return []
    best = _frontier(table)
    blocks: list[Block] = [
        Text(text=prose.COST),
        grid(
            f"{where}-cost-table",
            f"Cost of each method, {heading(table)}",
            "Method|Rank>|Parameters>|In the blocks>|Share of dense>|FLOPs per token>|Memory>|Tokens of a run>"
            "|FLOPs of a run>|Tokens per second>|Records",
            rows,
        ),
        *_blocks_of(charts.quality(table, where)),
    ]
    if best:
        blocks.append(Text(text=prose.FRONTIER.format(names=", ".join(best))))
    return blocks


def _budgets(table: Table, where: str) -> list[Block]:
    chart = charts.curves(table, where)
    if not table.budgets:
        return _blocks_of(chart)
    blocks: list[Block] = [
        Text(text=prose.BUDGETS),
        *_blocks_of(chart),
    ]
    for budget in table.budgets:
        title, unit, text = AXES[budget.axis]
        rows = [
            (
                row.method,
                NONE if row.fraction is None else formatting.percent(row.fraction),
                NONE if row.matched is None else f"FLOPs of {row.matched}",
                NONE if row.loss is None else formatting.loss(row.loss.mean),
                formatting.span(row.loss, formatting.loss),
                sources(row.records),
            )
            for row in budget.rows
        ]
        blocks.append(
            grid(
                f"{where}-{budget.axis}-table",
                f"{title}: validation loss after {text(budget.value)} {unit}, {heading(table)}",
                "Method|Share of its run>|Trained for|Validation loss>|95 % interval>|Records",
                rows,
            )
        )
        blocks += _budget_pairs(budget, where, f"{title}: paired differences of the validation loss, {heading(table)}")
    return blocks


def _budget_pairs(budget: Budget, where: str, caption: str) -> list[Block]:
    rows = [pair_cells(row.method, pair) for row in budget.rows for pair in row.against]
    return [grid(f"{where}-{budget.axis}-differences", caption, PAIR_COLUMNS, rows)] if rows else []


def _rates(table: Table, where: str) -> list[Block]:
    rows = [
        (
            row.method,
            formatting.rate(rate.learning_rate),
            "0" if rate.loss is None else str(rate.loss.seeds),
            str(rate.failed),
            NONE if rate.loss is None else formatting.loss(rate.loss.mean),
            _choice(rate, row),
            sources(rate.records),
        )
        for row in table.rows
        for rate in row.rates
    ]
    if not rows:
        return []
    return [
        Text(text=prose.RATES),
        *_blocks_of(charts.rates(table, where)),
        grid(
            f"{where}-rates-table",
            f"Runs of the sweep, {heading(table)}",
            "Method|Learning rate>|Finished>|Failed>|Validation loss>|Choice|Records",
            rows,
            folded=True,
        ),
    ]


def _choice(rate: Rate, row: Row) -> str:
    if rate.stopped_at is not None:
        return f"stopped at step {rate.stopped_at:,}"
    return "chosen" if rate.learning_rate == row.learning_rate else ""


def _drift(table: Table, where: str) -> list[Block]:
    found = [(row.method, row.drift) for row in table.rows if row.drift is not None]
    if not found:
        return []
    worst = [
        (
            name,
            str(len(drift.layers)),
            f"{max(drift.layers.values()):.2e}",
            max(drift.layers, key=lambda layer: drift.layers[layer]),
            f"{drift.logit:.2e}",
            f"{100 * drift.agreement:.2f} %",
        )
        for name, drift in found
    ]
    layers = dict.fromkeys(layer for _, drift in found for layer in drift.layers)
    return [
        Text(text=prose.DRIFT),
        grid(
            f"{where}-drift-table",
            f"What folding changed, the worst of all final runs, {heading(table)}",
            "Method|Layers>|Largest rounding of a weight>|In|Largest change of a logit>|Same next token>",
            worst,
        ),
        *_blocks_of(charts.drift(table, where)),
        grid(
            f"{where}-drift-layers",
            f"Largest rounding of a weight by layer, {heading(table)}",
            "|".join(["Layer", *(f"{name}>" for name, _ in found)]),
            [
                (layer, *(f"{drift.layers[layer]:.2e}" if layer in drift.layers else NONE for _, drift in found))
                for layer in layers
            ],
            folded=True,
        ),
    ]


def _spectra(table: Table, where: str) -> list[Block]:
    if not table.spectra:
        return []
    methods = list(dict.fromkeys(entry.method for entry in table.spectra))
    methods = [row.method for row in table.rows if row.method in methods]
    found = {(entry.layer, entry.method): entry for entry in table.spectra}
    layers = dict.fromkeys(entry.layer for entry in table.spectra)
    sizes = {layer: max(found[layer, name].size for name in methods if (layer, name) in found) for layer in layers}
    return [
        Text(text=prose.SPECTRA),
        *_blocks_of(charts.effective_ranks(table, where)),
        *_blocks_of(charts.spectra(table, where)),
        grid(
            f"{where}-spectra-table",
            f"Effective rank by layer, {heading(table)}",
            "|".join(["Layer", "Singular values>", *(f"{name}>" for name in methods)]),
            [
                (
                    layer,
                    str(sizes[layer]),
                    *(
                        f"{found[layer, name].effective_rank:.1f}" if (layer, name) in found else NONE
                        for name in methods
                    ),
                )
                for layer in layers
            ],
            folded=True,
        ),
    ]


def _samples(table: Table) -> list[Block]:
    samples = [Sample(title=row.method, text=row.sample) for row in table.rows if row.sample]
    if not samples:
        return []
    return [Text(text=prose.SAMPLES), *samples]


def _loss(found: Estimate | None) -> tuple[str, str]:
    return (NONE if found is None else formatting.loss(found.mean), formatting.span(found, formatting.loss))


def _perplexity(loss: Estimate | None) -> tuple[str, str]:
    return (NONE if loss is None else formatting.perplexity(loss.mean), formatting.span(loss, formatting.perplexity))


def _rate(row: Row) -> str:
    if row.learning_rate is None:
        return "not chosen yet"
    rate_text = formatting.rate(row.learning_rate)
    if row.learning_rate_of is not None:
        return f"{rate_text} (of {row.learning_rate_of})"
    return f"{rate_text} ({row.best_at_boundary})" if row.best_at_boundary is not None else rate_text


def _reach(row: Row) -> tuple[str, str]:
    """Movement and tokens per parameter."""
    if row.costs is None:
        return NONE, NONE
    movement, tokens = row.costs.movement, row.costs.tokens_per_parameter
    return (
        NONE if movement is None else formatting.ratio(movement),
        NONE if tokens is None else formatting.ratio(tokens),
    )


def _seeds(row: Row) -> str:
    parts = ((row.failed, "failed"), (len(row.missing), "missing"))
    return ", ".join([str(row.finished), *(f"{number} {what}" for number, what in parts if number)])


def _frontier(table: Table) -> list[str]:
    """Methods for which no other has at most the parameters and a lower mean test loss."""
    found = [(row.method, row.costs.parameters, row.test.mean) for row in table.rows if row.costs and row.test]
    return [name for name, size, loss in found if not any(s <= size and other < loss for _, s, other in found)]


def _blocks_of(chart: Chart | None) -> list[Block]:
    return [] if chart is None else [chart]
