"""What a run shows and keeps while it trains: a progress bar, and one JSON line per logged step."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

PLAIN_LINES = 10
"""Progress lines of a run whose output is no terminal."""


class ProgressReport(TrainerCallback):
    """A live bar on standard error; where that is no terminal, a line now and then."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.console = Console(stderr=True, highlight=False)
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
                TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("training", total=state.max_steps, loss=self.loss, speed=0.0)
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            steps = state.global_step - self.first_step
            speed = steps * self.tokens_per_step / (time.perf_counter() - self.began)
            self.bar.update(self.task, completed=state.global_step, loss=self.loss, speed=speed)

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
                f"step {state.global_step:>6} of {state.max_steps}  training loss {self.loss:.4f}", highlight=False
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
                lines.write(json.dumps({"step": state.global_step, **logs}) + "\n")
