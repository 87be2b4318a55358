"""A report as one HTML file that asks the network for nothing."""

from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from foldrank.report.blocks import Chart, Document, HeatMap, Look, Plot
from foldrank.report.svg import DASHES, SWATCHES, svg

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def html(document: Document) -> str:
    """The whole page, its style, script and pictures included. Whatever texts hold, none of it runs."""
    folder = files("foldrank.report").joinpath("page")
    template = _environment().get_template("report.html")
    return template.render(
        page=document,
        policy=POLICY,
        style=Markup(folder.joinpath("style.css").read_text()),
        script=Markup(folder.joinpath("charts.js").read_text()),
        swatches=SWATCHES,
        dashes=DASHES,
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("foldrank.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"kind": lambda block: type(block).__name__, "pictures": _pictures, "legend": _legend}
    return environment


def _pictures(chart: Chart) -> Iterator[Markup]:
    """Its views, each with texts that `svg` escaped."""
    for number, (_, picture) in enumerate(chart.views):
        yield Markup(svg(picture, f"{chart.id}-{number}"))


def _legend(chart: Chart) -> list[tuple[str, Look, str]]:
    """Name, look, and where it is in each view: its number there, or nothing."""
    plots: Sequence[Plot | HeatMap] = [picture for _, picture in chart.views]
    looks = {each.name: each.look for plot in plots if isinstance(plot, Plot) for each in plot.series}
    places = {
        name: " ".join(
            next((str(at) for at, each in enumerate(plot.series) if each.name == name), "-")
            if isinstance(plot, Plot)
            else "-"
            for plot in plots
        )
        for name in looks
    }
    return [(name, look, places[name]) for name, look in looks.items()]
