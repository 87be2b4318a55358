"""The answer to a study's question: what stands before all lists. Three sentences, and the pairs that they rest on."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from foldrank.compare import formatting
from foldrank.compare.analysis import Analysis, Row, Table
from foldrank.compare.curves import Against
from foldrank.compare.statistics import Verdict
from foldrank.compare.summary import counted, heading, is_effect_of_dlr, summary
from foldrank.recipes.methods import DENSE

RELATION: dict[Verdict, str] = {
    "lower": "is better than",
    "higher": "is worse than",
    "no difference shown": "is not shown different from",
    "too few seeds": "has too few seeds to be told from",
}

SAME_SIZE = 1.02
"""Up to so many times the parameters of another, a model counts as being of its size."""


def main_tables(analysis: Analysis) -> tuple[Table, ...]:
    """The tables of the study's first group, from the last size, which as a rule is the largest or longest, back."""
    groups = [table.group for table in analysis.tables]
    sizes = list(dict.fromkeys(table.size for table in analysis.tables))
    first = [table for table in analysis.tables if table.group == groups[0]]
    return tuple(sorted(first, key=lambda table: -sizes.index(table.size)))


def main_pairs(table: Table) -> list[tuple[Row, Against]]:
    """Each method against its own backbone without DLR, and against dense, where both have finished runs; all pairs
    that are compared where there is none of these.
    """
    kinds = {row.method: row.kind for row in table.rows}
    pairs = [(row, pair) for row in table.rows for pair in row.against if pair.difference.estimate is not None]
    main = [
        (row, pair)
        for row, pair in pairs
        if kinds[pair.method].backbone == DENSE or is_effect_of_dlr(row, kinds[pair.method])
    ]
    return main or pairs


def headline(analysis: Analysis) -> tuple[str, ...]:
    """At most three sentences: what DLR does, what low rank does, and what both rest on. None where nothing ended."""
    tables = main_tables(analysis)
    if not any(main_pairs(table) for table in tables):
        return ()
    found = (*_effect_of_dlr(tables), *_best_low_rank(tables))
    if not found:
        # Neither DLR nor dense: what there is to say of the first methods.
        found = tuple(sentence for _, sentences in summary(analysis) for sentence in sentences)[:2]
    return (*found, *_scope(tables))


def _effect_of_dlr(tables: Sequence[Table]) -> Iterator[str]:
    """How methods with DLR came out against the same without."""
    several = len(tables) > 1
    effects = []
    for table in tables:
        kinds = {row.method: row.kind for row in table.rows}
        for row, pair in main_pairs(table):
            if is_effect_of_dlr(row, kinds[pair.method]):
                where = f", {heading(table)}" if several else ""
                effects.append((pair.difference, f"{row.method}{where}"))
    if not effects:
        return
    if len(effects) == 1:
        difference, name = effects[0]
        assert difference.estimate is not None
        yield (
            f"The residual: {name} {RELATION[difference.verdict]} the same without it "
            f"({formatting.difference(difference.estimate)})."
        )
        return
    counts = counted(difference.verdict for difference, _ in effects)
    means = sorted((difference.estimate.mean, name) for difference, name in effects if difference.estimate is not None)
    (low, lowest), (high, highest) = means[0], means[-1]
    yield (
        f"The residual: of {len(effects)} comparisons with the same method without it, {counts}; the difference of the "
        f"test loss runs from {formatting.signed(low)} ({lowest}) to {formatting.signed(high)} ({highest})."
    )


def _best_low_rank(tables: Sequence[Table]) -> Iterator[str]:
    """The best low-rank method of the first table that has one, against dense and against what is as small."""
    for table in tables:
        rows = {row.method: row for row in table.rows if row.test is not None and row.costs is not None}
        ended = {name: row.test.mean for name, row in rows.items() if row.test is not None}
        pairs = [
            (row, pair)
            for row, pair in main_pairs(table)
            if row.method in rows and row.kind.backbone != DENSE and rows[pair.method].kind.backbone == DENSE
        ]
        if not pairs:
            continue
        best = min((row for row, _ in pairs), key=lambda row: ended[row.method])
        pair = min((pair for row, pair in pairs if row is best), key=lambda pair: ended[pair.method])
        size, dense_size = _parameters(best), _parameters(rows[pair.method])
        as_small = [name for name, row in rows.items() if _parameters(row) <= SAME_SIZE * size]
        lowest = min(as_small, key=lambda name: ended[name])
        others = (
            "no model of at most its size ends lower"
            if lowest == best.method
            else f"the lowest of at most its size is {lowest}, at {formatting.loss(ended[lowest])}"
        )
        assert pair.difference.estimate is not None
        yield (
            f"Low rank ({heading(table)}): the best, {best.method}, ends at {formatting.loss(ended[best.method])} with "
            f"{formatting.percent(size / dense_size)} of the parameters of {pair.method} and "
            f"{RELATION[pair.difference.verdict]} it ({formatting.difference(pair.difference.estimate)}); {others}."
        )
        return


def _scope(tables: Sequence[Table]) -> Iterator[str]:
    """What the sentences before rest on, and where they say nothing."""
    costs = [row.costs for table in tables for row in table.rows if row.costs is not None]
    seeds = [row.finished for table in tables for row in table.rows if row.finished]
    parts = [f"{_span(seeds, str)} seeds of each method on {' and '.join(map(heading, tables))}"]
    if tokens := [cost.tokens_per_parameter for cost in costs if cost.tokens_per_parameter is not None]:
        parts.append(f"{_span(tokens, formatting.ratio)} tokens per parameter")
    if movements := [cost.movement for cost in costs if cost.movement is not None]:
        parts.append(f"training that can move a weight by {_span(movements, formatting.ratio)} entries of the residual")
    yield f"This rests on {'; '.join(parts)}. It speaks of nothing else."


def _parameters(row: Row) -> int:
    assert row.costs is not None
    return row.costs.parameters


def _span(values: Sequence[float], text: Callable[[Any], str]) -> str:
    low, high = min(values), max(values)
    return text(low) if text(low) == text(high) else f"{text(low)} to {text(high)}"
