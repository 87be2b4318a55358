"""The report's first lines: what the verdicts say, in words, and nothing beyond them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from foldrank.compare import formatting
from foldrank.compare.analysis import Analysis, Row, Table
from foldrank.compare.statistics import Verdict
from foldrank.recipes.methods import Method

VERDICT_TEXT: dict[Verdict, str] = {
    "lower": "better",
    "higher": "worse",
    "no difference shown": "not shown different",
    "too few seeds": "too few seeds to say",
}
"""A verdict on a loss in words."""

FEW = 8
"""Up to so many comparisons each has a sentence; more are sorted by verdict."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A comparison that has at least one pair of runs."""

    row: Row
    other: str
    verdict: Verdict
    difference: str
    """The difference in words."""


def summary(analysis: Analysis) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Per table a heading and sentences about the test losses, as far as runs of both methods have finished.

    Where some method has DLR these are its comparisons, else those of all methods.
    """
    summaries = []
    for table in analysis.tables:
        rows = [row for row in table.rows if row.dlr and row.against] or table.rows
        pairs = [
            Compared(
                row=row, other=pair.method, verdict=pair.difference.verdict, difference=formatting.difference(estimate)
            )
            for row in rows
            for pair in row.against
            if (estimate := pair.difference.estimate) is not None
        ]
        if pairs:
            sentences = map(_sentence, pairs) if len(pairs) <= FEW else _sorted(pairs)
            summaries.append((heading(table), (*_count(pairs, table), *sentences)))
    return tuple(summaries)


def heading(table: Table) -> str:
    """What a table is about."""
    where = f"{table.corpus}, {table.size}"
    return where if table.group == "main" else f"{where}: {table.group}"


def _sentence(pair: Compared) -> str:
    name, other, difference = pair.row.method, pair.other, pair.difference
    match pair.verdict:
        case "lower":
            return f"{name} is better than {other}: its test loss is lower ({difference})."
        case "higher":
            return f"{name} is worse than {other}: its test loss is higher ({difference})."
        case "no difference shown":
            return f"{name} is not shown different from {other} ({difference})."
        case "too few seeds":
            return f"{name} against {other}: too few seeds to say ({difference})."


def _sorted(pairs: Sequence[Compared]) -> Iterator[str]:
    for other in dict.fromkeys(pair.other for pair in pairs):
        for verdict, text in VERDICT_TEXT.items():
            alike = [pair for pair in pairs if (pair.other, pair.verdict) == (other, verdict)]
            if alike:
                names = "; ".join(f"{pair.row.method} ({pair.difference})" for pair in alike)
                yield f"Against {other}, {text}: {names}."


def _count(pairs: Sequence[Compared], table: Table) -> Iterator[str]:
    """How methods with DLR came out against the same without."""
    kinds = {row.method: row.kind for row in table.rows}
    verdicts: list[Verdict] = [pair.verdict for pair in pairs if is_effect_of_dlr(pair.row, kinds[pair.other])]
    if len(verdicts) > 1:
        yield f"{len(verdicts)} methods with DLR against the same kind without: {counted(verdicts)}."


def is_effect_of_dlr(row: Row, other: Method) -> bool:
    """Whether a comparison with a method of the kind `other` is one of DLR with the same without it."""
    return row.dlr and row.kind.without_residual() == other


def counted(verdicts: Iterable[Verdict]) -> str:
    """How often each verdict was given, in words."""
    counts = Counter(verdicts)
    return ", ".join(f"{counts[verdict]} {text}" for verdict, text in VERDICT_TEXT.items() if counts[verdict])
