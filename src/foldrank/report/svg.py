"""A picture of a report as SVG, by Matplotlib; the page gives it the colours of the light or the dark."""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from foldrank.report.blocks import HeatMap, Look, Plot, Series

WIDTH = 374.0
"""Points. A phone shows it about as wide, a desk half as wide again."""
FONT = 9.0
ROW = 15.0
"""Height of a row of a heat map, in points."""
NAMES = 12
"""Most names along an axis; of more each second is left out, and so on."""
SHADE = 0.45
"""Of the darkest cell, on which the page's ink can be read in both schemes."""
DECADES = 3
"""A logarithmic axis of fewer has numbers at 1, 2 and 5."""

INK, QUIET, LINE = "#c0ff10", "#c0ff11", "#c0ff12"
VARIABLES = {INK: "--ink", QUIET: "--quiet", LINE: "--line"}
"""Colours that stand for the page's."""

STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": FONT,
    "axes.edgecolor": LINE,
    "axes.labelcolor": QUIET,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "grid.color": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}

SWATCHES = {
    "o": "M14 2a4 4 0 1 1 0 8a4 4 0 1 1 0-8z",
    "s": "M10 2h8v8h-8z",
    "D": "M14 1l5 5l-5 5l-5-5z",
    "^": "M14 1l5 9h-10z",
    "v": "M14 11l5-9h-10z",
    "P": "M12 2h4v2h3v4h-3v2h-4v-2h-3v-4h3z",
    "*": "M14 0l1.8 4h4.2l-3.4 2.7l1.3 4.3l-3.9-2.6l-3.9 2.6l1.3-4.3l-3.4-2.7h4.2z",
    "h": "M14 1l4.5 2.5v5l-4.5 2.5l-4.5-2.5v-5z",
    "x": "M10.5 2.5l7 7m0-7l-7 7",
}
"""The symbols as a legend beside the picture draws them, 28 by 12."""
DASHES = {"dashed": "6 3", "dotted": "2 2"}


def svg(picture: Plot | HeatMap, identity: str) -> str:
    """The picture as an SVG element without a size of its own.

    Args:
        picture: what is drawn. Its texts may hold anything.
        identity: no other picture of the page has it.
    """
    height = picture.height if isinstance(picture, Plot) else 40 + ROW * len(picture.rows)
    settings: Any = {**STYLE, "svg.hashsalt": identity}
    with rc_context(settings):
        # Names need as much room as they take; beside numbers it is always the same, and that is faster.
        layout = None if isinstance(picture, Plot) and not _has_names(picture) else "constrained"
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout=layout, facecolor="none")
        if layout is None:
            figure.subplots_adjust(left=50 / WIDTH, right=1 - 6 / WIDTH, bottom=34 / height, top=1 - 6 / height)
        axes = figure.add_subplot(facecolor="none")
        if isinstance(picture, Plot):
            _draw_plot(axes, picture)
        else:
            _draw_heat_map(axes, picture)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return _for_page(text.getvalue(), picture.series if isinstance(picture, Plot) else ())


def colour(look: Look) -> str:
    """What stands for the page's colour of a series."""
    return f"#c0ff0{look.colour}"


def _draw_plot(axes: Axes, plot: Plot) -> None:
    names_x, names_y = _names_x(plot.series), list(plot.names_y)[::-1]
    for number, series in enumerate(plot.series):
        x = [names_x.index(value) if isinstance(value, str) else value for value in series.x]
        y = [names_y.index(value) if isinstance(value, str) else float("nan") if value is None else value
             for value in series.y]  # fmt: skip
        look, paint, gid = series.look, colour(series.look), f"series-{number}"
        fill = "none" if look.hollow else paint
        points = {"markersize": series.size, "markerfacecolor": fill, "markeredgecolor": paint, "markeredgewidth": 1.2}
        if series.band is not None:
            axes.fill_between(x, *series.band, color=paint, alpha=0.18, linewidth=0, gid=f"{gid}-band")
        if series.half_x is not None or series.half_y is not None:
            bars = axes.errorbar(x, y, xerr=series.half_x, yerr=series.half_y, fmt="none", ecolor=paint, capsize=3)
            for part in (*bars[1], *bars[2]):
                part.set_gid(f"{gid}-bars")
        axes.plot(
            x, y, color=paint, linestyle=look.dash or "none", linewidth=1.4, marker=look.symbol, gid=gid, **points
        )
        for across, down, ringed in zip(x, y, series.ringed or (), strict=False):
            if ringed:
                axes.plot([across], [down], linestyle="none", marker="o", markersize=series.size + 6,
                          markerfacecolor="none", markeredgecolor=INK, gid=f"{gid}-ring")  # fmt: skip
    if plot.zero_x:
        axes.axvline(0, color=QUIET, linewidth=0.8)
    if plot.marks is not None:
        for moment in plot.marks.at:
            axes.axvline(moment, color=QUIET, linewidth=0.8, linestyle="dashdot")
    axes.grid(linewidth=0.5)
    axes.set_xlabel(_plain(plot.x_title))
    axes.set_ylabel(_plain(plot.y_title))
    _scale(axes, "x", names_x, plot.x_range, log=plot.log_x)
    _scale(axes, "y", names_y, plot.y_range, log=plot.log_y)


def _has_names(plot: Plot) -> bool:
    return bool(plot.names_y or _names_x(plot.series))


def _names_x(series: Sequence[Series]) -> list[str]:
    return list(dict.fromkeys(value for each in series for value in each.x if isinstance(value, str)))


def _scale(axes: Axes, axis: str, names: Sequence[str], limits: tuple[float, float] | None, *, log: bool) -> None:
    horizontal = axis == "x"
    one = axes.xaxis if horizontal else axes.yaxis
    if names:
        shown = range(0, len(names), 1 + (len(names) - 1) // NAMES) if horizontal else range(len(names))
        one.set_ticks(list(shown), labels=[_plain(names[place]) for place in shown])
        if horizontal:
            axes.tick_params("x", labelrotation=45)
        else:
            axes.set_ylim(-0.6, len(names) - 0.4)
        return
    if log:
        (axes.set_xscale if horizontal else axes.set_yscale)("log", nonpositive="mask")
        low, high = sorted(axes.get_xlim() if horizontal else axes.get_ylim())
        if 0 < high < low * 10**DECADES:
            one.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        one.set_minor_formatter(NullFormatter())
    else:
        one.set_major_locator(MaxNLocator(6))
        one.set_major_formatter(FuncFormatter(_short))
    if limits is not None:
        (axes.set_xlim if horizontal else axes.set_ylim)(*limits)


def _short(value: float, _: object) -> str:
    """1200000 as 1.2M."""
    for least, factor, letter in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / factor:.4g}{letter}"
    return f"{value:.4g}"


def _draw_heat_map(axes: Axes, heat: HeatMap) -> None:
    known = [value for row in heat.values for value in row if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    for row, values in enumerate(heat.values):
        for column, value in enumerate(values):
            if value is None:
                continue
            depth = 0.5 if high == low else (value - low) / (high - low)
            shade = 0.04 + (SHADE - 0.04) * depth
            axes.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, color="#c0ff03", alpha=shade, lw=0))
            axes.text(column, row, format(value, heat.format), color=INK, ha="center", va="center", size=6.5)
    axes.set_xlim(-0.5, len(heat.columns) - 0.5)
    axes.set_ylim(len(heat.rows) - 0.5, -0.5)
    axes.xaxis.set_ticks(range(len(heat.columns)), labels=[_plain(name) for name in heat.columns])
    axes.yaxis.set_ticks(range(len(heat.rows)), labels=[_plain(name) for name in heat.rows])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=7.5)
    for side in ("left", "bottom", "top"):
        axes.spines[side].set_visible(False)


def _plain(text: str) -> str:
    """Text on one line."""
    return " ".join(text.split())


def _for_page(text: str, series: Sequence[Series]) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1))
    text = re.sub(r' id="series-(\d+)(-\w+)?"', r' data-series="\1"', text)
    text = re.sub(r' id="(?![pmC][0-9a-f_]{10})[^"]*"', "", text)
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d?)\d+", r"\1", path[0]).replace("\n", ""), text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"#c0ff0(\d)", r"var(--series-\1)", text)
    for stands_for, variable in VARIABLES.items():
        text = text.replace(stands_for, f"var({variable})")
    for number, each in enumerate(series):
        if each.labels:
            text = _with_labels(text, number, each.labels)
    return re.sub(r">\s+<", "><", text).strip()


def _with_labels(text: str, number: int, labels: Sequence[str]) -> str:
    """Each point's text in its element, which a browser shows under a pointer."""
    begins = [found.start() for found in re.finditer(rf'<g data-series="{number}">', text)]
    for begin in reversed(begins):
        points = list(re.finditer(r"<use ([^>]*)/>", text[begin : text.find("</g>\n  ", begin)]))
        if len(points) == len(labels):
            for point, label in reversed(list(zip(points, labels, strict=True))):
                start, end = begin + point.start(), begin + point.end()
                text = f"{text[:start]}<use {point[1]}><title>{escape(label)}</title></use>{text[end:]}"
            return text
    return text
