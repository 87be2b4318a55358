"""What a report is made of. HTML and Markdown each draw these blocks and add nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field

COLOURS = 8
"""How many colours the page has for series (style.css)."""


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
class Look:
    """How a series looks: never by its colour alone."""

    colour: int
    """From 1 to `COLOURS`; the page knows which, in the light and in the dark."""
    symbol: str = "o"
    """Of its points, in Matplotlib's letters; empty for none."""
    dash: str = "solid"
    """Of its line, in Matplotlib's words; empty for none."""
    hollow: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Points that belong together. A name on an axis takes the place of a number where `x` or `y` are text."""

    name: str
    x: Sequence[float | str]
    y: Sequence[float | str | None]
    """None leaves a gap."""
    look: Look
    size: float = 5.0
    """Of its symbols, in points."""
    half_x: Sequence[float] | None = None
    """Half the width of the interval of each point."""
    half_y: Sequence[float] | None = None
    band: tuple[Sequence[float], Sequence[float]] | None = None
    """Lowest and highest at each `x`."""
    ringed: Sequence[bool] | None = None
    """Points that are large, with a ring."""
    labels: Sequence[str] | None = None
    """What a pointer over each point is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Marks:
    """Upright lines that mark moments, such as a run that went on."""

    name: str
    at: Sequence[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """Series over two axes."""

    series: Sequence[Series]
    x_title: str
    y_title: str
    log_x: bool = False
    log_y: bool = False
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    zero_x: bool = False
    """Whether a line stands where x is zero."""
    names_y: Sequence[str] = ()
    """Where `y` is text: all of it, from top to bottom."""
    marks: Marks | None = None
    height: float = 230.0
    """In points; all are equally wide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatMap:
    """A number for each pair, as a shade with the number in it where there is room."""

    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float | None]]
    """By row."""
    format: str
    """Of a number, in Python's terms."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A picture with one view or several to choose from. Its numbers are in the tables around it."""

    id: str
    title: str
    description: str
    """What it shows, for who does not see it."""
    views: Sequence[tuple[str, Plot | HeatMap]]
    """What each view is called, and what it shows."""
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
    """What is still to come, or went wrong; None where nothing is."""
    sections: Sequence[Section]
    footer: str
    """What made it, from what."""


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
