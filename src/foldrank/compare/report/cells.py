"""Cells that several tables of a report share."""

from collections.abc import Sequence

from foldrank.compare import formatting
from foldrank.compare.curves import Against
from foldrank.compare.formatting import NONE

PAIR_COLUMNS = "Method|Against|Seeds>|Difference>|95 % interval>|Standard deviation>|Verdict"


def pair_cells(name: str, pair: Against) -> tuple[str, ...]:
    """A row of `PAIR_COLUMNS`."""
    found = pair.difference.estimate
    return (
        name,
        pair.method,
        str(found.seeds) if found else "0",
        formatting.signed(found.mean) if found else NONE,
        formatting.span(found),
        NONE if found is None or found.sd is None else formatting.loss(found.sd),
        pair.difference.verdict,
    )


def sources(names: Sequence[str]) -> str:
    """Records in the shell's shorthand: run-seed{0,1,2} for run-seed0, run-seed1 and run-seed2."""
    if len(names) < 2:
        return names[0] if names else NONE
    start = _shared(names)
    end = _shared([name[len(start) :][::-1] for name in names])[::-1]
    return f"{start}{{{','.join(name[len(start) : len(name) - len(end)] for name in names)}}}{end}"


def _shared(names: Sequence[str]) -> str:
    """What all begin with."""
    first, last = min(names), max(names)
    return first[: next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
