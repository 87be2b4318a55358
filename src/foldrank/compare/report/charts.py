"""The charts of a study."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from foldrank.compare import formatting
from foldrank.compare.analysis import Row, Table
from foldrank.compare.curves import Against, Point
from foldrank.compare.headline import main_pairs
from foldrank.compare.method_cost import Costs
from foldrank.compare.report.traces import curve, half_widths, looks, points_only
from foldrank.compare.summary import heading
from foldrank.report.blocks import Chart, Look, Plot, Series

OVER: tuple[tuple[str, str, Callable[[Point], float | None]], ...] = (
    ("tokens", "Training tokens", lambda point: point.tokens),
    ("FLOPs", "Training FLOPs", lambda point: point.flops),
    ("training time", "Seconds of training", lambda point: point.seconds),
)


SIDES: tuple[tuple[str, str, Callable[[Costs], float | None]], ...] = (
    ("parameters", "Parameters", lambda costs: costs.parameters),
    ("parameters in the blocks", "Parameters of attention and MLP layers", lambda costs: costs.parameters_blocks),
    ("speed", "Training tokens per second", lambda costs: costs.tokens_per_second),
    ("FLOPs of a run", "Training FLOPs of a run", lambda costs: costs.flops),
    ("memory", "Computed memory in MiB", lambda costs: sum(costs.memory.values()) / 2**20),
)


def differences(table: Table, where: str) -> Chart | None:
    """Each paired difference with its interval, against zero."""
    figure = _forest([(row, pair) for row in table.rows for pair in row.against])
    if figure is None:
        return None
    return Chart(
        id=f"{where}-differences-chart",
        title="Paired differences of the test loss with 95 % intervals",
        description="Left of zero the first method is better. The table above has the numbers.",
        views=[("all", figure)],
    )


def answer(tables: Sequence[Table]) -> list[Chart]:
    """What the report begins with: a forest plot of the main pairs, and loss against parameters."""
    forests = [(heading(table), figure) for table in tables if (figure := _forest(main_pairs(table)))]
    sizes = [(heading(table), figure) for table in tables if (figure := _against_cost(table, *SIDES[0][1:]))]
    charts = []
    if forests:
        charts.append(
            Chart(
                id="answer-differences",
                title="Main differences of the test loss",
                description="Each method against its own backbone and against dense, where the study has these; paired "
                "by seed, with 95 % intervals. Left of zero the first method is better.",
                views=forests,
            )
        )
    if sizes:
        charts.append(
            Chart(
                id="answer-parameters",
                title="Test loss against parameters",
                description="Means with 95 % intervals. Lower and further left is better; whether two methods differ "
                "is said by the differences.",
                views=sizes,
            )
        )
    return charts


def _forest(pairs: Sequence[tuple[Row, Against]]) -> Plot | None:
    """Differences, one below the other; None where there is none."""
    estimates = [
        (f"{row.method} {formatting.MINUS} {pair.method}", pair.difference.estimate, pair.difference.verdict)
        for row, pair in pairs
        if pair.difference.estimate is not None
    ]
    if not estimates:
        return None
    looks = {
        "lower": Look(colour=3, dash=""),
        "higher": Look(colour=2, symbol="s", dash=""),
        "no difference shown": Look(colour=8, symbol="D", dash="", hollow=True),
        "too few seeds": Look(colour=8, symbol="x", dash=""),
    }
    series = [
        Series(
            name=verdict,
            x=[estimate.mean for _, estimate in of_verdict],
            y=[name for name, _ in of_verdict],
            half_x=half_widths([estimate for _, estimate in of_verdict]),
            look=look,
            labels=[f"{name}: {estimate.mean:+.4f}" for name, estimate in of_verdict],
        )
        for verdict, look in looks.items()
        if (of_verdict := [(name, estimate) for name, estimate, of_pair in estimates if of_pair == verdict])
    ]
    return Plot(
        series=series,
        names_y=[name for name, _, _ in estimates],
        x_title="Difference of test loss",
        y_title="",
        zero_x=True,
        height=60 + (24 if len(estimates) <= 8 else 15) * len(estimates),
    )


def curves(table: Table, where: str) -> Chart | None:
    """Validation loss along training: mean over seeds, band from the lowest to the highest."""
    look = looks(table)
    rows = [row for row in table.rows if row.curve]
    views = []
    for name, title, abscissa in OVER:
        series = [line for row in rows if (line := curve(row, look[row.method], abscissa))]
        if series:
            plot = Plot(series=series, x_title=title, y_title="Validation loss")
            views.append((f"over {name}", plot))
            last_values = [abscissa(row.curve[-1]) or 0.0 for row in rows]
            late = [p for row in rows for p in row.curve if (abscissa(p) or 0.0) >= 0.5 * max(last_values)]
            if late:
                low, high = min(p.lowest for p in late), max(p.highest for p in late)
                room = 0.05 * (high - low) + 1e-3
                zoomed = replace(
                    plot,
                    x_range=(0.5 * max(last_values), 1.02 * max(last_values)),
                    y_range=(low - room, high + room),
                )
                views.append((f"over {name}, second half", zoomed))
    if not views:
        return None
    last_values = ", ".join(f"{row.method} {formatting.loss(row.curve[-1].mean)}" for row in rows)
    return Chart(
        id=f"{where}-curves",
        title="Validation loss along training",
        description=f"Lines: means over seeds; bands: the lowest to the highest seed. At the end: {last_values}.",
        views=views,
        choose="Loss",
    )


def quality(table: Table, where: str) -> Chart | None:
    """Test loss against what a method costs."""
    rows = [row for row in table.rows if row.costs is not None and row.test is not None]
    views = [
        (f"against {name}", figure)
        for name, title, side in SIDES
        if (figure := _against_cost(table, title, side)) is not None
    ]
    if not views:
        return None
    of_pair = "; ".join(
        f"{row.method} {formatting.short(row.costs.parameters)} parameters, test loss {formatting.loss(row.test.mean)}"
        for row in rows
        if row.costs is not None and row.test is not None
    )
    return Chart(
        id=f"{where}-quality",
        title="Quality against cost",
        description=f"Mean test loss with its 95 % interval. {of_pair}.",
        views=views,
        choose="Test loss",
    )


def _against_cost(table: Table, title: str, side: Callable[[Costs], float | None]) -> Plot | None:
    """Test losses over one kind of cost; None where none is known."""
    look = looks(table)
    series = [
        Series(
            name=row.method,
            x=[x],
            y=[row.test.mean],
            half_y=half_widths([row.test]),
            look=points_only(look[row.method]),
            labels=[f"{row.method}: {x:,.4g}, loss {formatting.loss(row.test.mean)}"],
        )
        for row in table.rows
        if row.test is not None and row.costs is not None and (x := side(row.costs))
    ]
    return Plot(series=series, x_title=title, y_title="Test loss") if series else None


def rates(table: Table, where: str) -> Chart | None:
    """Validation loss of the sweep's runs over the learning rate; the chosen rate is ringed."""
    look = looks(table)
    series = []
    for row in table.rows:
        whole = [rate for rate in row.rates if rate.stopped_at is None]
        tried = [(rate.learning_rate, rate.loss) for rate in whole if rate.loss is not None]
        if tried:
            series.append(
                Series(
                    name=row.method,
                    x=[rate for rate, _ in tried],
                    y=[estimates.mean for _, estimates in tried],
                    look=look[row.method],
                    ringed=[math.isclose(rate, row.learning_rate or 0.0) for rate, _ in tried],
                    labels=[
                        f"{row.method}: rate {rate:.3g}, loss {formatting.loss(loss.mean)}" for rate, loss in tried
                    ],
                )
            )
    if not series:
        return None
    plot = Plot(series=series, x_title="Learning rate", y_title="Validation loss of the sweep", log_x=True)
    chosen = ", ".join(
        f"{row.method} {formatting.rate(row.learning_rate)}" for row in table.rows if row.rates and row.learning_rate
    )
    return Chart(
        id=f"{where}-rates",
        title="Learning rates tried",
        description=f"Means over the sweep's seeds. Ringed is the chosen rate: {chosen or 'none yet'}.",
        views=[("all", plot)],
    )


def drift(table: Table, where: str) -> Chart | None:
    """Largest rounding of a weight by the fold, per layer."""
    look = looks(table)
    series = [
        Series(
            name=row.method,
            x=[short_layer(layer) for layer in row.drift.layers],
            y=[value or None for value in row.drift.layers.values()],
            look=points_only(look[row.method]),
            labels=[f"{row.method}, {layer}: {value:.2e}" for layer, value in row.drift.layers.items() if value],
        )
        for row in table.rows
        if row.drift is not None
    ]
    if not series:
        return None
    largest = "; ".join(
        f"{row.method} at most {max(row.drift.layers.values()):.1e}" for row in table.rows if row.drift is not None
    )
    return Chart(
        id=f"{where}-drift",
        title="What the fold rounds, by layer",
        description=f"The worst of all final runs, on a logarithmic scale. {largest}.",
        views=[("all", Plot(series=series, x_title="Layer", y_title="Largest rounding of a weight", log_y=True))],
    )


def effective_ranks(table: Table, where: str) -> Chart | None:
    """Effective rank of each layer's whole matrix."""
    look = looks(table)
    series, means = [], []
    for row in table.rows:
        estimates = [entry for entry in table.spectra if entry.method == row.method]
        if estimates:
            ranks = [entry.effective_rank for entry in estimates]
            means.append(f"{row.method} {sum(ranks) / len(ranks):.1f}")
            series.append(
                Series(
                    name=row.method,
                    x=[short_layer(entry.layer) for entry in estimates],
                    y=ranks,
                    look=look[row.method],
                    labels=[f"{row.method}, {entry.layer}: {entry.effective_rank:.1f}" for entry in estimates],
                )
            )
    if not series:
        return None
    return Chart(
        id=f"{where}-effective-ranks",
        title="Effective rank by layer",
        description=f"One run of each method, the first seed. Mean over the layers: {', '.join(means)}.",
        views=[("all", Plot(series=series, x_title="Layer", y_title="Effective rank"))],
    )


def spectra(table: Table, where: str) -> Chart | None:
    """Singular values of one layer at a time."""
    look = looks(table)
    views = []
    for layer in dict.fromkeys(entry.layer for entry in table.spectra):
        series = [
            Series(
                name=entry.method,
                x=[position for position, _ in entry.drawn],
                y=[value or None for _, value in entry.drawn],
                look=replace(look[entry.method], symbol=""),
            )
            for entry in table.spectra
            if entry.layer == layer
        ]
        plot = Plot(
            series=series, x_title="Place of the singular value", y_title="Singular value over the largest", log_y=True
        )
        views.append((short_layer(layer), plot))
    if not views:
        return None
    return Chart(
        id=f"{where}-spectra",
        title="Singular values of a layer",
        description=(
            "Singular values of the folded model's whole weight matrix over the largest one, on a logarithmic scale, "
            f"for {len(views)} layers, one at a time. The table of effective ranks sums them up."
        ),
        views=views,
        choose="Layer",
    )


def short_layer(name: str) -> str:
    """A layer's name without what all share: 0.q_proj of model.layers.0.self_attn.q_proj."""
    return ".".join(part for part in name.split(".") if part not in ("model", "layers", "self_attn", "mlp"))
