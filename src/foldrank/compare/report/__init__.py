"""A study's report: one HTML file that needs nothing else, and the same in Markdown.

analysis -> `sections.document` (with `tables`, `charts`): blocks -> `foldrank.report`: text
"""

from foldrank.compare.analysis import Analysis
from foldrank.compare.report.sections import document
from foldrank.report.html import html
from foldrank.report.markdown import markdown

__all__ = ["report_html", "report_markdown"]


def report_html(analysis: Analysis) -> str:
    """The report as a page."""
    return html(document(analysis))


def report_markdown(analysis: Analysis) -> str:
    """The report in GitHub's Markdown."""
    return markdown(document(analysis))
