"""What a run shows while it trains, when it saves, and how it stops at a signal."""

import signal
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from foldrank.console import console
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
