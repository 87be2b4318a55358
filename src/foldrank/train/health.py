"""What goes wrong slowly, said in one line while a run trains, in its log, and on its page."""

import shutil
import statistics
from collections import deque
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from foldrank.console import console

GIB = 1 << 30
RECENT = 50
"""Log entries that say what is usual."""
NEWEST = 5
"""Log entries that say how fast it is now."""
SPIKE = 10.0
"""A gradient norm so many times the usual one is a spike."""
RISE = 1.0
"""A loss so much above the usual one is a spike, in nats per token."""
SLOW = 2.0
"""Seconds of a step so many times the usual ones are a fall of the speed."""


class Health(TrainerCallback):
    """Notes spikes of the gradient norm and of the loss, a fall of the speed to half, and a disk that is too small.

    A note stands in its log entry as `note`, and on standard error unless it is to be quiet. It comes before the log in
    a trainer's callbacks.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.recent: dict[str, deque[float]] = {
            name: deque(maxlen=RECENT) for name in ("grad_norm", "loss", "seconds per step")
        }
        self.before: tuple[int, float] | None = None
        self.newest: deque[float] = deque(maxlen=NEWEST)
        self.usual: float | None = None
        self.slow = False
        self.short_of_disk = False
        self.checkpoint_bytes = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        notes = [*self._spikes(logs), *self._slower(state.global_step, logs), *self._disk(args, state)]
        if skipped := logs.get("skipped_steps"):
            steps = "1 step was" if skipped == 1 else f"{skipped} steps were"
            notes.append(f"{steps} left out, as the gradient was not finite")
        if notes:
            logs["note"] = "; ".join(notes)
            if not self.quiet:
                console(stderr=True).print(f"step {state.global_step}: {logs['note']}")

    def _usual(self, name: str, value: float) -> float | None:
        """The median of the recent ones, None where they are few; the value joins them."""
        recent = self.recent[name]
        usual = statistics.median(recent) if len(recent) == RECENT else None
        recent.append(value)
        return usual

    def _spikes(self, logs: dict[str, Any]) -> list[str]:
        notes = []
        if "grad_norm" in logs:
            norm = float(logs["grad_norm"])
            usual = self._usual("grad_norm", norm)
            if usual is not None and norm > SPIKE * usual:
                notes.append(f"gradient norm {norm:.3g}, usually {usual:.3g}")
        usual = self._usual("loss", logs["loss"])
        if usual is not None and logs["loss"] > usual + RISE:
            notes.append(f"loss {logs['loss']:.4f}, usually {usual:.4f}")
        return notes

    def _slower(self, step: int, logs: dict[str, Any]) -> list[str]:
        """Once when it begins, and once when it ends."""
        if "seconds" not in logs:
            return []
        before, self.before = self.before, (step, logs["seconds"])
        if before is None or step <= before[0]:
            return []
        of_a_step = (logs["seconds"] - before[1]) / (step - before[0])
        self.newest.append(of_a_step)
        now = statistics.median(self.newest)  # one that is slow alone, after a checkpoint, tells nothing
        usual = None if self.slow else self._usual("seconds per step", of_a_step)
        usual = self.usual = usual or self.usual
        if usual is None or (now > SLOW * usual) == self.slow:
            return []
        self.slow = not self.slow
        return [f"a step takes {now:.3g} s, usually {usual:.3g} s" if self.slow else "steps are as fast as usual again"]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        saved = sorted(Path(str(args.output_dir)).glob("checkpoint-*"), key=lambda each: each.stat().st_mtime)
        if state.is_world_process_zero and saved:
            self.checkpoint_bytes = sum(file.stat().st_size for file in saved[-1].rglob("*") if file.is_file())

    def _disk(self, args: TrainingArguments, state: TrainerState) -> list[str]:
        """Whether the next checkpoint, as large as the newest, has room on the disk; said once."""
        if not self.checkpoint_bytes or state.global_step >= state.max_steps:
            return []
        needed, free = self.checkpoint_bytes, shutil.disk_usage(str(args.output_dir)).free
        before, self.short_of_disk = self.short_of_disk, free < needed
        if before or not self.short_of_disk:
            return []
        return [f"the disk has {free / GIB:.2f} GiB left, and the next checkpoint takes {needed / GIB:.2f} GiB"]
