"""The charts: figures in the terms of Plotly, their colours left to the page, which knows whether it is dark."""

import math
from collections.abc import Callable, Sequence

from foldrank.compare import formatting
from foldrank.compare.analysis import Row, Table
from foldrank.compare.curves import Against, Point
from foldrank.compare.headline import main_pairs
from foldrank.compare.method_cost import Costs
from foldrank.compare.report.blocks import Chart
from foldrank.compare.report.traces import Figure, axis, curve_traces, error_bars, method_look, styles
from foldrank.compare.summary import heading

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


def _forest(pairs: Sequence[tuple[Row, Against]]) -> Figure | None:
    """Differences, one below the other; None where there is none."""
    estimates = [
        (f"{row.method} {formatting.MINUS} {pair.method}", pair.difference.estimate, pair.difference.verdict)
        for row, pair in pairs
        if pair.difference.estimate is not None
    ]
    if not estimates:
        return None
    data = []
    looks = {
        "lower": ("@3", "circle"),
        "higher": ("@2", "square"),
        "no difference shown": ("@8", "diamond-open"),
        "too few seeds": ("@8", "x-thin-open"),
    }
    for verdict, (colour, symbol) in looks.items():
        of_verdict = [(name, estimate) for name, estimate, of_pair in estimates if of_pair == verdict]
        if of_verdict:
            data.append(
                {
                    "name": verdict,
                    "mode": "markers",
                    "x": [estimate.mean for _, estimate in of_verdict],
                    "y": [name for name, _ in of_verdict],
                    "error_x": error_bars([estimate for _, estimate in of_verdict], colour),
                    "marker": {"color": colour, "symbol": symbol, "size": 10, "line": {"color": colour, "width": 2}},
                    "hovertemplate": "%{y}<br>%{x:+.4f}<extra></extra>",
                }
            )
    layout = {
        "xaxis": axis("Difference of test loss", zeroline=True),
        "yaxis": {**axis(""), "categoryorder": "array", "categoryarray": [name for name, _, _ in estimates][::-1]},
        "height": 100 + (34 if len(estimates) <= 8 else 20) * len(estimates),
    }
    return {"data": data, "layout": layout}


def curves(table: Table, where: str) -> Chart | None:
    """Validation loss along training: mean over seeds, band from the lowest to the highest."""
    look = styles(table)
    rows = [row for row in table.rows if row.curve]
    views = []
    for name, title, abscissa in OVER:
        data = [trace for row in rows for trace in curve_traces(row, look[row.method], abscissa)]
        if data:
            layout = {"xaxis": axis(title), "yaxis": axis("Validation loss")}
            views.append((f"over {name}", {"data": data, "layout": layout}))
            last_values = [abscissa(row.curve[-1]) or 0.0 for row in rows]
            late = [p for row in rows for p in row.curve if (abscissa(p) or 0.0) >= 0.5 * max(last_values)]
            if late:
                low, high = min(p.lowest for p in late), max(p.highest for p in late)
                room = 0.05 * (high - low) + 1e-3
                zoomed = {
                    "xaxis": {**axis(title), "range": [0.5 * max(last_values), 1.02 * max(last_values)]},
                    "yaxis": {**axis("Validation loss"), "range": [low - room, high + room]},
                }
                views.append((f"over {name}, second half", {"data": data, "layout": zoomed}))
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


def _against_cost(table: Table, title: str, side: Callable[[Costs], float | None]) -> Figure | None:
    """Test losses over one kind of cost; None where none is known."""
    look = styles(table)
    data = [
        {
            **method_look(row.method, look[row.method]),
            "mode": "markers",
            "x": [x],
            "y": [row.test.mean],
            "error_y": error_bars([row.test], look[row.method].colour),
            "hovertemplate": f"{row.method}<br>%{{x:,.4s}}, loss %{{y:.4f}}<extra></extra>",
        }
        for row in table.rows
        if row.test is not None and row.costs is not None and (x := side(row.costs))
    ]
    return {"data": data, "layout": {"xaxis": axis(title), "yaxis": axis("Test loss")}} if data else None


def rates(table: Table, where: str) -> Chart | None:
    """Validation loss of the sweep's runs over the learning rate; the chosen rate is ringed."""
    look = styles(table)
    data: list[Figure] = []
    for row in table.rows:
        whole = [rate for rate in row.rates if rate.stopped_at is None]
        tried = [(rate.learning_rate, rate.loss) for rate in whole if rate.loss is not None]
        if tried:
            style = look[row.method]
            chosen = [math.isclose(rate, row.learning_rate or 0.0) for rate, _ in tried]
            data.append(
                {
                    **method_look(row.method, style),
                    "mode": "lines+markers",
                    "x": [rate for rate, _ in tried],
                    "y": [estimates.mean for _, estimates in tried],
                    "marker": {
                        "color": style.colour,
                        "symbol": style.symbol,
                        "size": [14 if is_chosen else 7 for is_chosen in chosen],
                        "line": {"color": "@ink", "width": [2 if is_chosen else 0 for is_chosen in chosen]},
                    },
                    "hovertemplate": f"{row.method}<br>rate %{{x:.3g}}, loss %{{y:.4f}}<extra></extra>",
                }
            )
    if not data:
        return None
    layout = {
        "xaxis": {**axis("Learning rate"), "type": "log", "tickformat": ".3~g"},
        "yaxis": axis("Validation loss of the sweep"),
    }
    chosen = ", ".join(
        f"{row.method} {formatting.rate(row.learning_rate)}" for row in table.rows if row.rates and row.learning_rate
    )
    return Chart(
        id=f"{where}-rates",
        title="Learning rates tried",
        description=f"Means over the sweep's seeds. Large and ringed is the chosen rate: {chosen or 'none yet'}.",
        views=[("all", {"data": data, "layout": layout})],
    )


def drift(table: Table, where: str) -> Chart | None:
    """Largest rounding of a weight by the fold, per layer."""
    look = styles(table)
    data = [
        {
            **method_look(row.method, look[row.method]),
            "mode": "markers",
            "x": [short_layer(layer) for layer in row.drift.layers],
            "y": [value or None for value in row.drift.layers.values()],
            "hovertemplate": f"{row.method}<br>%{{x}}: %{{y:.2e}}<extra></extra>",
        }
        for row in table.rows
        if row.drift is not None
    ]
    if not data:
        return None
    layout = {
        "xaxis": axis("Layer"),
        "yaxis": {**axis("Largest rounding of a weight"), "type": "log", "exponentformat": "power"},
    }
    largest = "; ".join(
        f"{row.method} at most {max(row.drift.layers.values()):.1e}" for row in table.rows if row.drift is not None
    )
    return Chart(
        id=f"{where}-drift",
        title="What the fold rounds, by layer",
        description=f"The worst of all final runs, on a logarithmic scale. {largest}.",
        views=[("all", {"data": data, "layout": layout})],
    )


def effective_ranks(table: Table, where: str) -> Chart | None:
    """Effective rank of each layer's whole matrix."""
    look = styles(table)
    data = []
    for row in table.rows:
        estimates = [entry for entry in table.spectra if entry.method == row.method]
        if estimates:
            data.append(
                {
                    **method_look(row.method, look[row.method]),
                    "mode": "lines+markers",
                    "x": [short_layer(entry.layer) for entry in estimates],
                    "y": [entry.effective_rank for entry in estimates],
                    "hovertemplate": f"{row.method}<br>%{{x}}: %{{y:.1f}}<extra></extra>",
                }
            )
    if not data:
        return None
    means = ", ".join(f"{trace['name']} {sum(trace['y']) / len(trace['y']):.1f}" for trace in data)
    return Chart(
        id=f"{where}-effective-ranks",
        title="Effective rank by layer",
        description=f"One run of each method, the first seed. Mean over the layers: {means}.",
        views=[("all", {"data": data, "layout": {"xaxis": axis("Layer"), "yaxis": axis("Effective rank")}})],
    )


def spectra(table: Table, where: str) -> Chart | None:
    """Singular values of one layer at a time."""
    look = styles(table)
    views = []
    for layer in dict.fromkeys(entry.layer for entry in table.spectra):
        data = [
            {
                **method_look(entry.method, look[entry.method]),
                "mode": "lines",
                "x": [position for position, _ in entry.drawn],
                "y": [value or None for _, value in entry.drawn],
                "hovertemplate": f"{entry.method}<br>%{{x}}: %{{y:.3g}}<extra></extra>",
            }
            for entry in table.spectra
            if entry.layer == layer
        ]
        layout = {
            "xaxis": axis("Place of the singular value"),
            "yaxis": {**axis("Singular value over the largest"), "type": "log", "exponentformat": "power"},
        }
        views.append((short_layer(layer), {"data": data, "layout": layout}))
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
