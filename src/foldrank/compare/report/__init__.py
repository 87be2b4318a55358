"""A study's report: one HTML file that needs nothing else, and the same in Markdown.

analysis -> `sections.document` (with `tables`, `charts`): blocks -> `html`, `markdown`: text
"""

from foldrank.compare.report.html import report_html
from foldrank.compare.report.markdown import report_markdown

__all__ = ["report_html", "report_markdown"]
