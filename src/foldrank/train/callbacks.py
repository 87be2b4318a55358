"""What a run shows and keeps while it trains, and how it stops: a bar, JSON lines, spikes, signals."""

import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from foldrank.atomic import write_text
from foldrank.console import console
from foldrank.structured import parse_json, to_json
from foldrank.train.processes import agreement, end_with_launcher

PLAIN_LINES = 10
"""Progress lines of a run whose output is no terminal."""


class TrainingProgressBar(TrainerCallback):
    """A live bar on standard error; where that is no terminal, a line now and then.

    Args:
        tokens_per_step: training tokens of a step, on average.
        utilization: from steps and seconds to the MFU, None where it is not known.
    """

    def __init__(
        self, tokens_per_step: float, utilization: Callable[[int, float], float | None] = lambda *_: None
    ) -> None:
        self.tokens_per_step = tokens_per_step
        self.utilization = utilization
        self.console = console(stderr=True)
        self.bar: Progress | None = None
        self.began = 0.0
        self.first_step = 0
        self.loss = float("nan")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.began = time.perf_counter()
        self.first_step = state.global_step
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("training", total=state.max_steps, loss=self.loss, speed="")
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, loss=self.loss, speed=self.speed(state.global_step))

    def speed(self, step: int) -> str:
        """Tokens a second since the training began or went on, and the utilization where it is known."""
        steps, seconds = step - self.first_step, time.perf_counter() - self.began
        mfu = self.utilization(steps, seconds)
        return f"{steps * self.tokens_per_step / seconds:,.0f} tokens/s" + ("" if mfu is None else f"  MFU {mfu:.1%}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        self.loss = logs.get("loss", self.loss)
        if "eval_loss" in logs:
            self.console.print(
                f"step {state.global_step:>6} of {state.max_steps}  training loss {self.loss:.4f}  "
                f"validation loss {logs['eval_loss']:.4f}",
            )
        elif self.bar is None and "loss" in logs and state.global_step % max(1, state.max_steps // PLAIN_LINES) == 0:
            self.console.print(
                f"step {state.global_step:>6} of {state.max_steps}  training loss {self.loss:.4f}  "
                f"{self.speed(state.global_step)}",
                highlight=False,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.stop()


class JsonLines(TrainerCallback):
    """Appends each log entry of the run to a file, as one JSON object with its step."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A run that goes on repeats the steps since its checkpoint.
        if state.is_world_process_zero and self.file.exists():
            lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            write_text(self.file, "".join(line for line in lines if _is_entry(line, state.global_step)))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs is not None:
            with self.file.open("a") as lines:
                lines.write(to_json({"step": state.global_step, **logs}) + "\n")


def _is_entry(line: str, last_step: int) -> bool:
    """Whether a line of the log is whole and of a step that is not repeated; a power cut may leave anything there."""
    try:
        return line.endswith("\n") and parse_json(line)["step"] <= last_step
    except (ValueError, KeyError, TypeError):
        return False


class SaveAfter(TrainerCallback):
    """Saves a checkpoint after these steps, whatever the cadence."""

    def __init__(self, steps: Collection[int]) -> None:
        self.steps = steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            control.should_save = True


class PauseAfter(TrainerCallback):
    """Ends the training after a step, evaluated and saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step < state.max_steps:
            control.should_evaluate = control.should_save = control.should_training_stop = True


class GradientSpikes(TrainerCallback):
    """Logs when a gradient norm is far above the recent ones; on standard error too, unless it is to be quiet."""

    FACTOR = 10.0
    RECENT = 50

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.recent: deque[float] = deque(maxlen=self.RECENT)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None or "grad_norm" not in logs:
            return
        norm = float(logs["grad_norm"])
        if len(self.recent) == self.RECENT and norm > self.FACTOR * (usual := statistics.median(self.recent)):
            if not self.quiet:
                console(stderr=True).print(f"step {state.global_step}: gradient norm {norm:.3g}, usually {usual:.3g}")
            logs["grad_norm_spike"] = norm / usual
        self.recent.append(norm)


class StopOnSignal(TrainerCallback):
    """On SIGTERM, SIGINT or SIGHUP (a closed terminal): saves a checkpoint after the step in progress and ends.

    A signal to any one of the processes that share a run ends all of them after the same step.

    A second signal acts as it would without this class. One that follows within a second is the first once more: a
    terminal and a launcher may both send it, and a launcher of several threads does where it is killed.

    Enter it as a context around the training. In a thread other than the main one, where Python knows no handlers, it
    does nothing.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    SAME = 1.0
    """Seconds."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._largest: Callable[[int], int] = lambda number: number

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            # Under nohup a hang-up is to be ignored.
            ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            handled = [number for number in self.SIGNALS if number != signal.SIGHUP or not ignored]
            self._before = {number: signal.signal(number, self._receive) for number in handled}
            end_with_launcher()
        self._largest = agreement()
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if number := self._largest(self.received or 0):
            self.received = signal.Signals(number)
            control.should_save = True
            control.should_training_stop = True

    def _receive(self, number: int, frame: object) -> None:
        if self._received_at is None:
            self.received, self._received_at = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._received_at > self.SAME:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
