"""How the preparation of data shows how far it is, and when it will be done."""

import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from foldrank.console import console

SECONDS_BETWEEN_LINES = 10.0
"""Of output that is no terminal."""


class PreparationProgressBar:
    """A live bar with an estimate on standard error; where that is no terminal, a line now and then.

    An instance is a `Progress` of `foldrank.data.prepare`, to be used in a `with` block.
    """

    def __init__(self) -> None:
        self.console = console(stderr=True)
        self.stage = ""
        self.began = 0.0
        self.last_written = 0.0
        self.bar: Progress | None = None

    def __enter__(self) -> "PreparationProgressBar":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    def __call__(self, stage: str, documents: int, fraction: float | None) -> None:
        if stage != self.stage:
            self._start(stage)
        if self.bar is not None:
            total = None if fraction is None else 1.0
            self.bar.update(self.task, completed=fraction or 0.0, total=total, documents=documents)
        elif fraction != 1.0 and time.monotonic() - self.last_written >= SECONDS_BETWEEN_LINES:
            self._write(f"{stage}: {documents:,} documents{self._estimate(fraction)}")
        if fraction == 1.0:
            # Before the run that follows shows a bar of its own.
            self._stop()
            self._write(f"{stage}: {documents:,} documents in {time.monotonic() - self.began:.0f} s")

    def _start(self, stage: str) -> None:
        self._stop()
        self.stage, self.began = stage, time.monotonic()
        if not self.console.is_terminal:
            self._write(f"{stage} ...")
            return
        self.bar = Progress(
            TextColumn(stage),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[documents]:,} documents"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.task = self.bar.add_task(stage, total=None, documents=0)
        self.bar.start()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        self.stage = ""

    def _write(self, line: str) -> None:
        self.last_written = time.monotonic()
        self.console.print(line)

    def _estimate(self, fraction: float | None) -> str:
        if not fraction:
            return ""
        left = (time.monotonic() - self.began) * (1 - fraction) / fraction
        return (
            f", {fraction:.0%}, about {left / 60:.0f} min left"
            if left >= 90
            else f", {fraction:.0%}, about {left:.0f} s left"
        )
