"""How far a study is: what is done, who trains what, what waits; from its folder alone."""

from dataclasses import dataclass
from pathlib import Path

from foldrank.compare.plan import Run as Planned
from foldrank.compare.plan import expected
from foldrank.compare.records import read_records
from foldrank.compare.study_file import load_study
from foldrank.report.formatting import count, loss
from foldrank.runs.run import Run, is_run, read_run
from foldrank.runs.watch import duration, seconds_left

NEXT = 5
"""Waiting runs that are named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Queue:
    """The runs of a study that its records ask for so far."""

    title: str
    done: int
    failed: int
    begun: tuple[tuple[str, Run], ...]
    """Id and folder of those that train, or did."""
    waiting: tuple[str, ...]


def read_queue(folder: Path) -> Queue:
    """The queue of the study in a folder.

    Raises:
        ValueError: where it is none, or holds a file that is no record.
    """
    study, records = load_study(folder / "study.yaml"), read_records(folder)
    left = [run for run in expected(study, records) if run.id not in records]
    # Rungs of a halving share the folder of their whole run: the first of them is the one that trains.
    first = {run.folder: run.id for run in reversed(left)}
    names = {first[run.folder] for run in left if is_run(_folder(folder, run))}
    begun = [(run.id, read_run(_folder(folder, run), at_a_glance=True)) for run in left if run.id in names]
    return Queue(
        title=study.title,
        done=len(records),
        failed=sum(record.error is not None for record in records.values()),
        begun=tuple(begun),
        waiting=tuple(run.id for run in left if run.id not in names),
    )


def _folder(study: Path, run: Planned) -> Path:
    return study / "runs" / run.folder


def queue_screen(queue: Queue) -> str:
    """The queue on a terminal's screen."""
    failed = f", of which {queue.failed} failed" if queue.failed else ""
    known = queue.done + len(queue.begun) + len(queue.waiting)
    lines = [f"{queue.title}: {queue.done} of {known} runs done{failed}; a sweep that ends asks for more"]
    workers = {(session.host, session.pid) for _, run in queue.begun if run.state == "running"
               for session in run.log.sessions[-1:]}  # fmt: skip
    lines.append(f"workers that train: {len(workers)}")
    for name, run in queue.begun:
        of = f" of {count(run.steps)}" if run.steps else ""
        at = f"step {count(run.log.step)}{of}"
        if run.log.points:
            at += f", training loss {loss(run.log.points[-1].loss)}"
        if run.state == "running":
            session = run.log.sessions[-1] if run.log.sessions else None
            at += f", {session.host} process {session.pid}" if session and session.host else ""
            at += f", {duration(left)} of training left" if (left := seconds_left(run)) is not None else ""
        else:
            at += f", {run.state}: the same foldrank compare goes on with it"
        lines.append(f"  {name}: {at}")
    lines.append(f"waiting: {len(queue.waiting)}")
    lines += [f"  {name}" for name in queue.waiting[:NEXT]]
    return "\n".join(lines)
