"""The page of a run, written by the command that ran it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foldrank.console import speaks_for_all


@contextmanager
def run_page(folder: Path, notes: list[str]) -> Iterator[None]:
    """Around a run: writes its page, also where a single process ended early. What keeps that from it is a note."""
    before = _last_change(folder)
    try:
        yield
    except BaseException:
        # A run that was refused leaves the page of the one in the folder alone. Of several processes a launcher kills
        # what is left of them, perhaps before the one line is said that matters.
        if _last_change(folder) != before and os.environ.get("WORLD_SIZE", "1") == "1":
            _write(folder, notes)
        raise
    _write(folder, notes)


def _last_change(folder: Path) -> int | None:
    """Of the log; None where there is none."""
    log = folder / "log.jsonl"
    return log.stat().st_mtime_ns if log.exists() else None


def _write(folder: Path, notes: list[str]) -> None:
    from foldrank.runs.page import PAGE, write_page

    if not speaks_for_all():
        return
    try:
        write_page([folder], folder / PAGE)
    except (OSError, ValueError) as error:
        notes.append(f"{folder / PAGE} was not written: {error}")
