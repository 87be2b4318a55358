"""The report's first lines: what the verdicts say, in words, and nothing beyond them."""

from collections import Counter
from collections.abc import Sequence

from foldrank.compare import words
from foldrank.compare.analysis import Analysis, Row, Table
from foldrank.compare.curves import Against
from foldrank.compare.study import DLR


def summary(analysis: Analysis) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Per table a heading, and a sentence per comparison of the test losses.

    Where some method has DLR these are its comparisons, else those of all methods.
    """
    found = []
    for table in analysis.tables:
        rows = [row for row in table.rows if row.kind.endswith(DLR)] or table.rows
        sentences = [_sentence(row.method, pair) for row in rows for pair in row.against]
        if sentences:
            count = _count(rows, table)
            found.append((heading(table), (*([count] if count else []), *sentences)))
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
            return f"{name} against {pair.method}: too few seeds ({said})."


def _count(rows: Sequence[Row], table: Table) -> str | None:
    """How methods with DLR came out against the same without."""
    kinds = {row.method: row.kind for row in table.rows}
    verdicts = Counter(
        pair.difference.verdict for row in rows for pair in row.against if row.kind == kinds.get(pair.method, "") + DLR
    )
    if not verdicts:
        return None
    said = ", ".join(
        f"{verdicts[name]} {text}"
        for name, text in (
            ("lower", "better"),
            ("higher", "worse"),
            ("no difference shown", "not shown different"),
            ("too few seeds", "with too few seeds to say"),
        )
        if verdicts[name]
    )
    return f"With DLR against the same without it, {verdicts.total()} compared: {said}."
