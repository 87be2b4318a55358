"""What a report is made of. HTML and Markdown each draw these blocks and add nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Points:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """Words and what they mean."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A table. The first column names the row."""

    id: str
    caption: str
    columns: Sequence[str]
    numeric: Sequence[bool]
    """Which columns hold numbers, which stand to the right."""
    rows: Sequence[Sequence[str]]
    folded: bool = False
    """Shown on demand."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A picture with one view or several to choose from. Its numbers are in the tables around it."""

    id: str
    title: str
    description: str
    """What it shows, for who does not see it."""
    views: Sequence[tuple[str, dict[str, Any]]]
    """(label, {"data": traces, "layout": axes}) in the terms of Plotly; "@3" stands for the third colour."""
    choose: str = "Show"
    """What a view is called."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Text that a model wrote."""

    title: str
    text: str


Block = Text | Points | Terms | Grid | Chart | Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A heading and what stands below it."""

    id: str
    title: str
    blocks: Sequence[Block] = ()
    parts: Sequence["Section"] = field(default=())


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A report."""

    title: str
    question: str
    banner: str | None
    """What is still to come; None for a study that is done."""
    sections: Sequence[Section]


def grid(name: str, caption: str, columns: str, rows: Sequence[Sequence[str]], *, folded: bool = False) -> Grid:
    """Columns stand between bars; one that ends in > holds numbers."""
    titles = columns.split("|")
    return Grid(
        id=name,
        caption=caption,
        columns=[title.removesuffix(">") for title in titles],
        numeric=[title.endswith(">") for title in titles],
        rows=rows,
        folded=folded,
    )
