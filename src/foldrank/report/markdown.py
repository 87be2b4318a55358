"""A report as Markdown: the tables and texts of the page, a line for each chart."""

import re
from collections.abc import Iterator, Sequence

from foldrank.report.blocks import Block, Chart, Document, Grid, Points, Sample, Section, Terms, Text


def markdown(page: Document) -> str:
    """The whole report in GitHub's Markdown."""
    lines = [f"# {_escape(page.title)}", ""]
    for text in (page.question, page.banner and f"**{_escape(page.banner)}**"):
        if text:
            lines += [text if text.startswith("**") else _escape(text), ""]
    for section in page.sections:
        lines += _section(section, 2)
    return "\n".join(lines).rstrip() + "\n"


def _section(section: Section, level: int) -> Iterator[str]:
    yield from (f"{'#' * level} {_escape(section.title)}", "")
    for block in section.blocks:
        yield from (*_block(block), "")
    for part in section.parts:
        yield from _section(part, level + 1)


def _block(block: Block) -> Iterator[str]:
    match block:
        case Text():
            yield _escape(block.text)
        case Points():
            yield from (f"- {_escape(item)}" for item in block.items)
        case Terms():
            yield from (f"- **{_escape(term)}**: {_escape(meaning)}" for term, meaning in block.items)
        case Chart():
            yield f"*{_escape(block.title)} (chart in report.html).* {_escape(block.description)}"
        case Sample():
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
            yield from (f"{_escape(block.title)}:", "", f"{fence}text", block.text, fence)
        case Grid(folded=True):
            yield from ("<details>", f"<summary>{_escape(block.caption)}</summary>", "")
            yield from (*_rows(block), "", "</details>")
        case Grid():
            yield from (f"**{_escape(block.caption)}**", "", *_rows(block))


def _rows(grid: Grid) -> Iterator[str]:
    yield _row(grid.columns)
    yield "|" + "|".join("---:" if numeric else "---" for numeric in grid.numeric) + "|"
    yield from map(_row, grid.rows)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escape, cells))} |"


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", " ".join(text.split()))
