"""The log of a run while it trains, `log.jsonl`: what `foldrank.runs` shows.

Each line is a JSON object with `step` and `time` (seconds since 1970). It is an entry of `Trainer`, or an event: the
run `began` or `went on` in a process, it `stopped`, or it wrote a `text`.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from foldrank.atomic import write_text
from foldrank.console import one_line
from foldrank.structured import parse_json, to_json


class RunLog(TrainerCallback):
    """Appends each log entry of a run to a file, as one JSON object with its step.

    Args:
        file: that it is appended to.
        facts: what the run is from its first step on, written once it begins or goes on.
        text: what the model writes at each evaluation.
        together: whether all processes must write it, since each holds a share of the model.
    """

    def __init__(
        self,
        file: Path,
        facts: Mapping[str, Any] | None = None,
        text: Callable[[], str] | None = None,
        *,
        together: bool = False,
    ) -> None:
        self.file = file
        self.facts = facts or {}
        self.text = text
        self.together = together

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        # A run that goes on repeats the steps since its checkpoint.
        if self.file.exists():
            lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            write_text(self.file, "".join(line for line in lines if _is_entry(line, state.global_step)))
        event = "went on" if state.global_step else "began"
        process = {"host": socket.gethostname(), "pid": os.getpid()}
        self._append(state.global_step, {"event": event, "steps": state.max_steps, **process, **self.facts})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs is not None:
            self._append(state.global_step, logs)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.text is not None and (self.together or state.is_world_process_zero):
            text = self.text()
            if state.is_world_process_zero:
                self._append(state.global_step, {"event": "text", "text": text})

    def stopped(self, step: int, why: BaseException) -> None:
        """The run ends here, unfinished. A disk that is full keeps it from being written, and changes nothing."""
        with suppress(OSError):
            self._append(step, {"event": "stopped", "message": one_line(why)})

    def _append(self, step: int, entry: Mapping[str, Any]) -> None:
        with self.file.open("a") as lines:
            lines.write(to_json({"step": step, **entry, "time": round(time.time(), 3)}) + "\n")


@contextmanager
def end_logged(log: RunLog, trainer: Trainer) -> Iterator[None]:
    """Writes why a training ended, where it did not end by itself."""
    try:
        yield
    except Exception as error:
        if trainer.is_world_process_zero():
            log.stopped(trainer.state.global_step, error)
        raise


def _is_entry(line: str, last_step: int) -> bool:
    """Whether a line of the log is whole and of a step that is not repeated; a power cut may leave anything there."""
    try:
        return line.endswith("\n") and parse_json(line)["step"] <= last_step
    except (ValueError, KeyError, TypeError):
        return False
