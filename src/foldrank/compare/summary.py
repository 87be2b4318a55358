"""The report's first lines: what the verdicts say, in words, and nothing beyond them."""

from collections import Counter
from collections.abc import Iterator, Sequence

from foldrank.compare import words
from foldrank.compare.analysis import Analysis, Row, Table
from foldrank.compare.curves import Against
from foldrank.compare.statistics import Verdict
from foldrank.compare.study import DLR

SAID: dict[Verdict, str] = {
    "lower": "better",
    "higher": "worse",
    "no difference shown": "not shown different",
    "too few seeds": "too few seeds to say",
}
"""A verdict on a loss in words."""

FEW = 8
"""Up to so many comparisons each has a sentence; more are sorted by verdict."""


def summary(analysis: Analysis) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Per table a heading and sentences about the test losses.

    Where some method has DLR these are its comparisons, else those of all methods.
    """
    found = []
    for table in analysis.tables:
        rows = [row for row in table.rows if row.dlr and row.against] or [row for row in table.rows if row.against]
        pairs = [(row.method, pair) for row in rows for pair in row.against]
        if pairs:
            sentences = [_sentence(name, pair) for name, pair in pairs] if len(pairs) <= FEW else _sorted(pairs)
            found.append((heading(table), (*_count(rows, table), *sentences)))
    return tuple(found)


def heading(table: Table) -> str:
    """What a table is about."""
    where = f"{table.corpus}, {table.size}"
    return where if table.group == "main" else f"{where}: {table.group}"


def _sentence(name: str, pair: Against) -> str:
    found = pair.difference.estimate
    if found is None:
        return f"{name} against {pair.method}: no seed has finished with both."
    said = words.difference(found)
    match pair.difference.verdict:
        case "lower":
            return f"{name} is better than {pair.method}: its test loss is lower ({said})."
        case "higher":
            return f"{name} is worse than {pair.method}: its test loss is higher ({said})."
        case "no difference shown":
            return f"{name} is not shown different from {pair.method} ({said})."
        case "too few seeds":
            return f"{name} against {pair.method}: too few seeds to say ({said})."


def _sorted(pairs: Sequence[tuple[str, Against]]) -> Iterator[str]:
    for other in dict.fromkeys(pair.method for _, pair in pairs):
        for verdict, said in SAID.items():
            names = [
                name if (found := pair.difference.estimate) is None else f"{name} ({words.difference(found)})"
                for name, pair in pairs
                if (pair.method, pair.difference.verdict) == (other, verdict)
            ]
            if names:
                yield f"Against {other}, {said}: {'; '.join(names)}."


def _count(rows: Sequence[Row], table: Table) -> Iterator[str]:
    """How methods with DLR came out against the same without."""
    kinds = {row.method: row.kind for row in table.rows}
    verdicts = Counter(
        pair.difference.verdict
        for row in rows
        for pair in row.against
        if row.dlr and row.kind == kinds.get(pair.method, "") + DLR
    )
    if verdicts.total() > 1:
        said = ", ".join(f"{verdicts[verdict]} {text}" for verdict, text in SAID.items() if verdicts[verdict])
        yield f"{verdicts.total()} methods with DLR against the same kind without: {said}."
