"""A report as one HTML file that asks the network for nothing."""

import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from foldrank.compare.analysis import Analysis
from foldrank.compare.report.blocks import Chart, Section
from foldrank.compare.report.sections import document


def report_html(analysis: Analysis) -> str:
    """The whole page, its style, its script and Plotly's included."""
    page = document(analysis)
    environment = Environment(
        loader=PackageLoader("foldrank.compare.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["kind"] = lambda block: type(block).__name__
    figures = {chart.id: [figure for _, figure in chart.views] for chart in _charts(page.sections)}
    page_folder = files("foldrank.compare.report").joinpath("page")
    return environment.get_template("report.html").render(
        page=page,
        style=Markup(page_folder.joinpath("style.css").read_text()),
        script=Markup(page_folder.joinpath("charts.js").read_text()),
        plotly=Markup(get_plotlyjs()) if figures else "",
        figures=_script_json(figures),
    )


def _charts(sections: Any) -> list[Chart]:
    charts: list[Chart] = []
    for section in sections:
        assert isinstance(section, Section)
        charts += [block for block in section.blocks if isinstance(block, Chart)]
        charts += _charts(section.parts)
    return charts


def _script_json(value: Any) -> Markup:
    """JSON that cannot end the script element in which it stands."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e"))
