"""A run by its folder: what was asked, what it logged, what it measured, and whether it goes on."""

import shlex
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from foldrank.runs.log import Log, glance, read_log
from foldrank.structured import read_json_table, read_yaml

QUIET_SECONDS = 600.0
"""Of a run on another machine, so long without an entry, or ten times as long as one takes, is a sign that it died."""

Kind = Literal["pretrain", "finetune"]
CONFIG: Mapping[Kind, str] = {"pretrain": "config.yaml", "finetune": "finetune.yaml"}

State = Literal["finished", "running", "stopped", "dead"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A pre-training or a fine-tuning."""

    path: Path
    kind: Kind
    about: Mapping[str, Any]
    """What its settings' file says of the run itself: versions, commit, data."""
    settings: Mapping[str, Any]
    log: Log
    metrics: Mapping[str, Any] | None
    """None while it is not finished."""
    damaged: str | None
    """What is wrong with its metrics.json, if anything is."""

    @property
    def name(self) -> str:
        """The recipe, or the task and what was fine-tuned."""
        if self.kind == "pretrain":
            return str(self.about.get("recipe", self.path.name))
        return f"{self.settings.get('task', 'fine-tuning')} on {self.settings.get('data', 'its data')}"

    @property
    def steps(self) -> int | None:
        """Which it is to have."""
        train = self.settings.get("train")
        of_recipe = train.get("steps") if isinstance(train, Mapping) else None
        return of_recipe if isinstance(of_recipe, int) else self.log.steps

    @property
    def state(self) -> State:
        """Whether it goes on. A run that said why it ended is stopped; one that vanished is dead."""
        if self.metrics is not None:
            return "finished"
        if self.log.stopped is not None:
            return "stopped"
        return "running" if self._lives() else "dead"

    @property
    def resume_line(self) -> str:
        """The command that goes on with it."""
        out = shlex.quote(str(self.path))
        if self.kind == "pretrain":
            return f"foldrank pretrain {shlex.quote(str(self.path / 'config.yaml'))} --out {out} --resume"
        checkpoint = shlex.quote(str(self.about.get("checkpoint", "CHECKPOINT")))
        settings = shlex.quote(str(self.path / "finetune.yaml"))
        return f"foldrank finetune {checkpoint} --settings {settings} --out {out} --resume"

    def _lives(self) -> bool:
        if not self.log.sessions:
            # Before its first entry, while it prepares: the settings were written when it began.
            began = (self.path / CONFIG[self.kind]).stat().st_mtime
            return time.time() - began < QUIET_SECONDS
        session = self.log.sessions[-1]
        if session.host == socket.gethostname() and session.pid is not None:
            try:
                process = psutil.Process(session.pid)
                # Its number may be another's by now.
                return process.create_time() <= (session.time or 0.0) and process.status() != psutil.STATUS_ZOMBIE
            except psutil.Error:
                return False
        last, steps = self.log.last_time or 0.0, self.log.step - session.step
        usual = (last - (session.time or last)) / steps if steps else 0.0
        return time.time() - last < max(QUIET_SECONDS, 10 * usual)


def read_run(path: Path, *, at_a_glance: bool = False) -> Run:
    """The run in a folder.

    Args:
        path: the folder.
        at_a_glance: read a long log at places alone, in milliseconds.

    Raises:
        ValueError: where it is none.
    """
    for kind, name in CONFIG.items():
        file = path / name
        if file.is_file():
            settings = read_yaml(file)
            about = settings.pop("run", None)
            if isinstance(about, Mapping):
                metrics, damaged = _metrics(path / "metrics.json")
                log = (glance if at_a_glance else read_log)(path / "log.jsonl")
                return Run(path=path, kind=kind, about=about, settings=settings, log=log, metrics=metrics,
                           damaged=damaged)  # fmt: skip
    raise ValueError(f"{path} holds no run: a run's folder has a config.yaml or finetune.yaml that foldrank wrote")


def is_run(path: Path) -> bool:
    """Whether a folder looks like one of a run."""
    return any((path / name).is_file() for name in CONFIG.values())


def is_study(path: Path) -> bool:
    """Whether a folder is one of a study, and not of a run.

    Raises:
        ValueError: where it is neither.
    """
    if is_run(path):
        return False
    if not (path / "study.yaml").is_file():
        raise ValueError(
            f"{path} is neither a run nor a study: a run's folder has a config.yaml or finetune.yaml, a study's a "
            "study.yaml"
        )
    return True


def _metrics(file: Path) -> tuple[Mapping[str, Any] | None, str | None]:
    if not file.is_file():
        return None, None
    try:
        return read_json_table(file), None
    except ValueError as error:
        return None, str(error)
