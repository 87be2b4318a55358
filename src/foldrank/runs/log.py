"""A run's log, read whole or, of a long one, at places: `foldrank.train.run_log` writes it."""

import gc
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

PLACES = 600
"""Entries of a long log that a glance reads."""
SHORT = 1 << 19
"""Bytes of a log that a glance reads whole."""
TAIL = 1 << 16
"""Bytes at the end that a glance reads."""


NUMBERS = frozenset({int, float})
"""Neither truth values nor text."""


class Point(NamedTuple):
    """A log entry of training; None for what it does not say."""

    step: int
    loss: float
    grad_norm: float | None
    learning_rate: float | None
    seconds: float | None
    """Of training so far, in all the processes that the run had."""
    speed: float | None
    """Tokens a second since the entry before."""
    memory: float | None
    """Bytes at the peak."""


class Evaluation(NamedTuple):
    """A log entry of an evaluation."""

    step: int
    loss: float
    train_loss: float | None
    """Mean since the evaluation before."""


class Session(NamedTuple):
    """A process that trained from a step on."""

    step: int
    time: float | None
    """Seconds since 1970."""
    host: str | None
    pid: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Log:
    """What a log holds."""

    points: list[Point] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    texts: list[tuple[int, str]] = field(default_factory=list)
    notes: list[tuple[int, str]] = field(default_factory=list)
    """Step and sentence, of what went wrong."""
    steps: int | None = None
    """Which the run is to have."""
    tokens_per_step: float | None = None
    flops_per_step: float | None = None
    peak_flops: float | None = None
    stopped: str | None = None
    """Why the last process ended early, if it said so."""
    last_time: float | None = None
    """Of the last entry, in seconds since 1970."""
    whole: bool = True
    """False where it was read at places alone."""

    @property
    def step(self) -> int:
        """The last one that is logged."""
        return max(
            (entries[-1].step for entries in (self.points, self.evaluations, self.sessions) if entries), default=0
        )

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which a field of the points is known, and its values there."""
        at = Point._fields.index(name)
        values = [point[at] for point in self.points]
        return (
            [point[0] for point, value in zip(self.points, values, strict=True) if value is not None],
            [value for value in values if value is not None],
        )


def read_log(file: Path) -> Log:
    """The whole log; an empty one where there is none."""
    if not file.is_file():  # nor read what never ends, as a pipe
        return Log()
    collects = gc.isenabled()
    gc.disable()  # it would go through all entries again and again, and none of them is in a cycle
    try:
        with file.open("rb") as lines:
            return _log(_entries(lines))
    finally:
        if collects:
            gc.enable()


def glance(file: Path) -> Log:
    """The log as far as a screen can show it: of a long one, entries at even distances and the newest."""
    if not file.is_file() or file.stat().st_size <= SHORT:
        return read_log(file)
    with file.open("rb") as lines, mmap.mmap(lines.fileno(), 0, access=mmap.ACCESS_READ) as text:
        places = [len(text) * number // PLACES for number in range(PLACES)]
        chosen = {text.find(b"\n", place) + 1 if place else 0 for place in places}
        chosen |= {_line_with(text, mark) for mark in (b'"eval_loss"', b'"event": "went on"')}
        end = text.find(b"\n", len(text) - TAIL) + 1
        sampled = sorted(place for place in chosen if 0 <= place < end)
        found = [text[place : text.find(b"\n", place) + 1] for place in sampled]
        return _log(_entries([*found, *text[end:].splitlines(keepends=True)]), whole=False)


def _line_with(text: mmap.mmap, mark: bytes) -> int:
    """Where the last line with these bytes begins; -1 where none has them."""
    place = text.rfind(mark)
    return -1 if place < 0 else text.rfind(b"\n", 0, place) + 1


def _entries(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            entry = from_json(line, allow_inf_nan=False)
        except ValueError:
            continue  # the last line, which is being written, or what a power cut left
        if isinstance(entry, dict) and line.endswith(b"\n"):
            yield entry


def _number(entry: Mapping[str, Any], name: str) -> float | None:
    value = entry.get(name)
    return value if value.__class__ in NUMBERS and math.isfinite(value) else None  # pyright: ignore


class _Clock:
    """From the seconds of each process to those of the run, and its speed."""

    def __init__(self) -> None:
        self.tokens_per_step: float | None = None
        self.offset = self.seconds = 0.0
        self.step: int | None = None

    def restart(self, tokens_per_step: float | None) -> None:
        self.tokens_per_step, self.offset, self.step = tokens_per_step, self.seconds, None

    def read(self, step: int, seconds: float | None) -> tuple[float | None, float | None]:
        if seconds is None:
            return None, None
        spent, steps, speed = self.offset + seconds - self.seconds, step - (self.step or step), None
        if steps > 0 and spent > 0 and self.tokens_per_step:
            speed = steps * self.tokens_per_step / spent
        self.step, self.seconds = step, self.offset + seconds
        return self.seconds, speed


def _log(entries: Iterable[dict[str, Any]], *, whole: bool = True) -> Log:
    log = Log()
    facts: dict[str, Any] = dict.fromkeys(("steps", "tokens_per_step", "flops_per_step", "peak_flops"))
    stopped, time, since = None, None, []
    clock = _Clock()
    for entry in entries:
        if (number := _number(entry, "step")) is None:
            continue
        step = int(number)
        time = _number(entry, "time") or time
        event = entry.get("event")
        if event in ("began", "went on"):
            stopped = None
            host, pid = entry.get("host"), _number(entry, "pid")
            host = host if isinstance(host, str) else None
            log.sessions.append(Session(step, _number(entry, "time"), host, None if pid is None else int(pid)))
            facts |= {name: value for name in facts if (value := _number(entry, name)) is not None}
            clock.restart(facts["tokens_per_step"])
        elif event == "text" and isinstance(entry.get("text"), str):
            log.texts.append((step, entry["text"]))
        elif event == "stopped" and isinstance(entry.get("message"), str):
            stopped = entry["message"]
            log.notes.append((step, f"ended: {stopped}"))
        elif (loss := _number(entry, "eval_loss")) is not None:
            log.evaluations.append(Evaluation(step, loss, sum(since) / len(since) if since else None))
            since = []
        elif (loss := _number(entry, "loss")) is not None:
            seconds, speed = clock.read(step, _number(entry, "seconds"))
            norm, rate = _number(entry, "grad_norm"), _number(entry, "learning_rate")
            log.points.append(Point(step, loss, norm, rate, seconds, speed, _number(entry, "peak_memory_bytes")))
            since.append(loss)
            if isinstance(entry.get("note"), str):
                log.notes.append((step, entry["note"]))
    if facts["steps"] is not None:
        facts["steps"] = int(facts["steps"])
    return replace(log, stopped=stopped, last_time=time, whole=whole, **facts)
