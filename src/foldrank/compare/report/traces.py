"""What the charts are drawn with: how a method looks, its lines and bands, axes, error bars, as Plotly takes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from foldrank.compare.analysis import Row, Table
from foldrank.compare.curves import Point
from foldrank.compare.statistics import Estimate
from foldrank.recipes.methods import DENSE

COLOURS = 8
"""How many colours the page has (style.css)."""

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star", "hexagon")

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
            symbol=SYMBOLS[(number + number // COLOURS) % len(SYMBOLS)],
            dash="dot" if row.kind.backbone == DENSE else "solid" if row.kind.residual else "dash",
        )
        for number, (row, name) in enumerate(zip(table.rows, names, strict=True))
    }


def curve_traces(row: Row, style: Style, abscissa: Callable[[Point], float | None]) -> list[Figure]:
    """A method's mean loss over `abscissa`, behind it a band over its seeds."""
    points = [(x, point) for point in row.curve if (x := abscissa(point)) is not None]
    if not points:
        return []
    x = [x for x, _ in points]
    band = {
        "name": row.method,
        "legendgroup": row.method,
        "mode": "lines",
        "x": x + x[::-1],
        "y": [point.highest for _, point in points] + [point.lowest for _, point in reversed(points)],
        "fill": "toself",
        "fillcolor": f"{style.colour}-soft",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "meta": "band",
    }
    line = {
        **method_look(row.method, style),
        "mode": "lines+markers",
        "x": x,
        "y": [point.mean for _, point in points],
        "hovertemplate": f"{row.method}<br>%{{x:.4s}}: loss %{{y:.4f}}<extra></extra>",
    }
    line["marker"] = {**line["marker"], "size": 5}
    return [band, line] if row.finished > 1 else [line]


def method_look(name: str, style: Style) -> Figure:
    """What every trace of a method has."""
    return {
        "name": name,
        "legendgroup": name,
        "line": {"color": style.colour, "dash": style.dash, "width": 2},
        "marker": {"color": style.colour, "symbol": style.symbol, "size": 9},
    }


def error_bars(estimates: Sequence[Estimate], colour: str) -> Figure:
    """Half the width of each confidence interval."""
    half = [0.0 if each.ci_high is None else each.ci_high - each.mean for each in estimates]
    return {"type": "data", "array": half, "color": colour, "thickness": 1.6, "width": 5}


def axis(title: str, **more: Any) -> Figure:
    """An axis with a title."""
    return {"title": {"text": title}, "zeroline": False, **more}
