"""The charts: figures in the terms of Plotly, their colours left to the page, which knows whether it is dark."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from foldrank.compare import formatting as words
from foldrank.compare.analysis import Row, Table
from foldrank.compare.curves import Point
from foldrank.compare.report.blocks import Chart
from foldrank.compare.statistics import Estimate
from foldrank.recipes.methods import DENSE

COLOURS = 8
"""How many colours the page has (style.css)."""

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star", "hexagon")

OVER: tuple[tuple[str, str, Callable[[Point], float | None]], ...] = (
    ("tokens", "Training tokens", lambda point: point.tokens),
    ("FLOPs", "Training FLOPs", lambda point: point.flops),
    ("training time", "Seconds of training", lambda point: point.seconds),
)

Figure = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """How a method looks in every chart: never by its colour alone."""

    colour: str
    symbol: str
    dash: str


def styles(table: Table) -> dict[str, Style]:
    """A colour per backbone, solid with DLR and dashed without; where a kind has several methods, a colour each."""
    one_of_a_kind = len({row.kind for row in table.rows}) == len(table.rows)
    names = [row.kind.backbone if one_of_a_kind else row.method for row in table.rows]
    order = list(dict.fromkeys(names))
    return {
        row.method: Style(
            colour=f"@{order.index(name) % COLOURS + 1}",
            symbol=SYMBOLS[(place + place // COLOURS) % len(SYMBOLS)],
            dash="dot" if row.kind.backbone == DENSE else "solid" if row.kind.residual else "dash",
        )
        for place, (row, name) in enumerate(zip(table.rows, names, strict=True))
    }


def differences(table: Table, where: str) -> Chart | None:
    """Each paired difference with its interval, against zero."""
    pairs = [
        (f"{row.method} {words.MINUS} {pair.method}", pair.difference) for row in table.rows for pair in row.against
    ]
    found = [(name, each.estimate, each.verdict) for name, each in pairs if each.estimate is not None]
    if not found:
        return None
    data = []
    looks = {
        "lower": ("@3", "circle"),
        "higher": ("@2", "square"),
        "no difference shown": ("@8", "diamond-open"),
        "too few seeds": ("@8", "x-thin-open"),
    }
    for verdict, (colour, symbol) in looks.items():
        of_verdict = [(name, estimate) for name, estimate, said in found if said == verdict]
        if of_verdict:
            data.append(
                {
                    "name": verdict,
                    "mode": "markers",
                    "x": [estimate.mean for _, estimate in of_verdict],
                    "y": [name for name, _ in of_verdict],
                    "error_x": _bars([estimate for _, estimate in of_verdict], colour),
                    "marker": {"color": colour, "symbol": symbol, "size": 10, "line": {"color": colour, "width": 2}},
                    "hovertemplate": "%{y}<br>%{x:+.4f}<extra></extra>",
                }
            )
    layout = {
        "xaxis": _axis("Difference of test loss", zeroline=True),
        "yaxis": {**_axis(""), "categoryorder": "array", "categoryarray": [name for name, _, _ in found][::-1]},
        "height": 130 + 34 * len(found),
    }
    return Chart(
        id=f"{where}-differences-chart",
        title="Paired differences of the test loss with 95 % intervals",
        description="Left of zero the first method is better. The table above has the numbers.",
        views=[("all", {"data": data, "layout": layout})],
    )


def curves(table: Table, where: str) -> Chart | None:
    """Validation loss along training: mean over seeds, band from the lowest to the highest."""
    look = styles(table)
    rows = [row for row in table.rows if row.curve]
    views = []
    for name, title, place in OVER:
        data = [trace for row in rows for trace in _curve(row, look[row.method], place)]
        if data:
            layout = {"xaxis": _axis(title), "yaxis": _axis("Validation loss")}
            views.append((f"over {name}", {"data": data, "layout": layout}))
            ends = [place(row.curve[-1]) or 0.0 for row in rows]
            late = [p for row in rows for p in row.curve if (place(p) or 0.0) >= 0.5 * max(ends)]
            if late:
                low, high = min(p.low for p in late), max(p.high for p in late)
                room = 0.05 * (high - low) + 1e-3
                zoomed = {
                    "xaxis": {**_axis(title), "range": [0.5 * max(ends), 1.02 * max(ends)]},
                    "yaxis": {**_axis("Validation loss"), "range": [low - room, high + room]},
                }
                views.append((f"over {name}, second half", {"data": data, "layout": zoomed}))
    if not views:
        return None
    ends = ", ".join(f"{row.method} {words.loss(row.curve[-1].mean)}" for row in rows)
    return Chart(
        id=f"{where}-curves",
        title="Validation loss along training",
        description=f"Lines are means over seeds, bands reach from the lowest to the highest seed. At the end: {ends}.",
        views=views,
        choose="Loss",
    )


def quality(table: Table, where: str) -> Chart | None:
    """Test loss against what a method costs."""
    look = styles(table)
    sides = (
        ("parameters", "Parameters", lambda row: row.costs.parameters),
        ("speed", "Training tokens per second", lambda row: row.costs.tokens_per_second),
        ("FLOPs of a run", "Training FLOPs of a run", lambda row: row.costs.flops),
        ("memory", "Computed memory in MiB", lambda row: sum(row.costs.memory.values()) / 2**20),
    )
    rows = [row for row in table.rows if row.costs is not None and row.test is not None]
    views = []
    for name, title, side in sides:
        known = [row for row in rows if side(row)]
        if known:
            data = [
                {
                    **_base(row.method, look[row.method]),
                    "mode": "markers",
                    "x": [side(row)],
                    "y": [row.test.mean],
                    "error_y": _bars([row.test], look[row.method].colour),
                    "hovertemplate": f"{row.method}<br>%{{x:,.4s}}, loss %{{y:.4f}}<extra></extra>",
                }
                for row in known
                if row.test is not None
            ]
            layout = {"xaxis": _axis(title), "yaxis": _axis("Test loss")}
            views.append((f"against {name}", {"data": data, "layout": layout}))
    if not views:
        return None
    said = "; ".join(
        f"{row.method} {words.short(row.costs.parameters)} parameters, test loss {words.loss(row.test.mean)}"
        for row in rows
        if row.costs is not None and row.test is not None
    )
    return Chart(
        id=f"{where}-quality",
        title="Quality against cost",
        description=f"Mean test loss with its 95 % interval. {said}.",
        views=views,
        choose="Test loss",
    )


def rates(table: Table, where: str) -> Chart | None:
    """Validation loss of the sweep's runs over the learning rate; the chosen rate is ringed."""
    look = styles(table)
    data: list[Figure] = []
    for row in table.rows:
        tried = [(rate.learning_rate, rate.loss) for rate in row.rates if rate.loss is not None]
        if tried:
            style = look[row.method]
            chosen = [math.isclose(rate, row.learning_rate or 0.0) for rate, _ in tried]
            data.append(
                {
                    **_base(row.method, style),
                    "mode": "lines+markers",
                    "x": [rate for rate, _ in tried],
                    "y": [found.mean for _, found in tried],
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
        "xaxis": {**_axis("Learning rate"), "type": "log", "tickformat": ".3~g"},
        "yaxis": _axis("Validation loss of the sweep"),
    }
    chosen = ", ".join(
        f"{row.method} {words.rate(row.learning_rate)}" for row in table.rows if row.rates and row.learning_rate
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
            **_base(row.method, look[row.method]),
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
        "xaxis": _axis("Layer"),
        "yaxis": {**_axis("Largest rounding of a weight"), "type": "log", "exponentformat": "power"},
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
        found = [entry for entry in table.spectra if entry.method == row.method]
        if found:
            data.append(
                {
                    **_base(row.method, look[row.method]),
                    "mode": "lines+markers",
                    "x": [short_layer(entry.layer) for entry in found],
                    "y": [entry.effective_rank for entry in found],
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
        views=[("all", {"data": data, "layout": {"xaxis": _axis("Layer"), "yaxis": _axis("Effective rank")}})],
    )


def spectra(table: Table, where: str) -> Chart | None:
    """Singular values of one layer at a time."""
    look = styles(table)
    views = []
    for layer in dict.fromkeys(entry.layer for entry in table.spectra):
        data = [
            {
                **_base(entry.method, look[entry.method]),
                "mode": "lines",
                "x": [place for place, _ in entry.drawn],
                "y": [value or None for _, value in entry.drawn],
                "hovertemplate": f"{entry.method}<br>%{{x}}: %{{y:.3g}}<extra></extra>",
            }
            for entry in table.spectra
            if entry.layer == layer
        ]
        layout = {
            "xaxis": _axis("Place of the singular value"),
            "yaxis": {**_axis("Singular value over the largest"), "type": "log", "exponentformat": "power"},
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


def _curve(row: Row, style: Style, place: Callable[[Point], float | None]) -> list[Figure]:
    points = [(at, point) for point in row.curve if (at := place(point)) is not None]
    if not points:
        return []
    x = [at for at, _ in points]
    band = {
        "name": row.method,
        "legendgroup": row.method,
        "mode": "lines",
        "x": x + x[::-1],
        "y": [point.high for _, point in points] + [point.low for _, point in reversed(points)],
        "fill": "toself",
        "fillcolor": f"{style.colour}-soft",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "meta": "band",
    }
    line = {
        **_base(row.method, style),
        "mode": "lines+markers",
        "x": x,
        "y": [point.mean for _, point in points],
        "hovertemplate": f"{row.method}<br>%{{x:.4s}}: loss %{{y:.4f}}<extra></extra>",
    }
    line["marker"] = {**line["marker"], "size": 5}
    return [band, line] if row.finished > 1 else [line]


def _base(name: str, style: Style) -> Figure:
    return {
        "name": name,
        "legendgroup": name,
        "line": {"color": style.colour, "dash": style.dash, "width": 2},
        "marker": {"color": style.colour, "symbol": style.symbol, "size": 9},
    }


def _bars(found: Sequence[Estimate], colour: str) -> Figure:
    half = [0.0 if each.high is None else each.high - each.mean for each in found]
    return {"type": "data", "array": half, "color": colour, "thickness": 1.6, "width": 5}


def _axis(title: str, **more: Any) -> Figure:
    return {"title": {"text": title}, "zeroline": False, **more}
