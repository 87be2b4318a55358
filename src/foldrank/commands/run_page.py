"""The page of a run, written by the command that ran it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foldrank.console import speaks_for_all


@contextmanager
def run_page(folder: Path, notes: list[str]) -> Iterator[None]:
    """Around a run: writes its page whether it finished or ended early. What keeps that from being done is a note."""
    try:
        yield
    except BaseException:
        if _is_of_this_process(folder):
            _write(folder, notes)
        raise
    if speaks_for_all():
        _write(folder, notes)


def _is_of_this_process(folder: Path) -> bool:
    """Whether the run in the folder trained in this process: a run that was refused leaves another one's page alone."""
    from foldrank.runs.log import glance

    sessions = glance(folder / "log.jsonl").sessions
    return bool(sessions) and sessions[-1].pid == os.getpid() and speaks_for_all()


def _write(folder: Path, notes: list[str]) -> None:
    from foldrank.runs.page import PAGE, write_page

    try:
        write_page([folder], folder / PAGE)
    except (OSError, ValueError) as error:
        notes.append(f"{folder / PAGE} was not written: {error}")
