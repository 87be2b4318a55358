"""The folder that a training writes: what is its own, what may be emptied, who holds it, whether it goes on by itself.

A folder is one where its file of settings says so, under `run`. Nothing else is ever emptied.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from filelock import Timeout

from foldrank.atomic import write_text
from foldrank.data.cache import machine_lock
from foldrank.provenance import commit, versions
from foldrank.structured import read_yaml, to_yaml
from foldrank.train.checkpoints import checkpoints, step_of, verify
from foldrank.train.processes import is_restart, launch

SCHEMA = 2
"""Version of the files of settings."""

CONFIGS = ("config.yaml", "finetune.yaml")
"""Names of these files."""


@dataclass(frozen=True, slots=True)
class OutputFolder(ABC):
    """A folder for a training, whether it is there or not."""

    path: Path

    config_name: ClassVar[str]

    @property
    def config(self) -> Path:
        """The resolved settings, which can be run again, with what they ran on under `run`."""
        return self.path / self.config_name

    @property
    def log(self) -> Path:
        """One JSON object a log entry."""
        return self.path / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        """From which an interrupted run goes on."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """What the run measured, written last."""
        return self.path / "metrics.json"

    def is_run(self) -> bool:
        """Whether the folder is a run's, by what its config.yaml says."""
        about, _ = self._read()
        return about is not None

    def goes_on_by_itself(self) -> bool:
        """Whether torchrun began the training in this folder and has started its processes anew: since one of them was
        lost, or the number of machines has changed.
        """
        if is_restart():
            return self.is_run()
        return launch() is not None and self._launch() == launch() and not self.metrics.exists()

    def check_free(self, *, overwrite: bool) -> None:
        """Refuses a folder that holds something, saying what. Nothing but a run is ever overwritten.

        Raises:
            FileExistsError: naming what the folder holds.
        """
        out = self._resolved()
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
        if not self.is_run():
            what = "holds files that are no run" if out.is_dir() else "is a file"
            raise FileExistsError(f"{self.path} {what}: choose another folder with --out")
        if not overwrite:
            raise FileExistsError(self._what_it_holds())
        below = [file for name in CONFIGS for file in sorted(out.rglob(name)) if file.parent != out]
        if other := next((file.parent for file in below if _about(_settings(file)) is not None), None):
            raise FileExistsError(f"{self.path} has another run below it, {other}: move it away before --overwrite")

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Holds the folder for this process, until the block ends or the process does.

        Raises:
            FileExistsError: where another process on this machine holds it.
        """
        lock = machine_lock("run", self._resolved())
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise FileExistsError(
                f"another run has begun in {self.path} and goes on: choose another folder with --out"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def empty(self) -> None:
        """Takes away what the run before left, if there was one, and makes the folder.

        Raises:
            FileExistsError: as `check_free`.
            OSError: where it cannot be written.
        """
        self.check_free(overwrite=True)
        # Its content and not the folder itself, which may be a mount point, a link, or where somebody stands.
        folder = self._resolved()
        folder.mkdir(parents=True, exist_ok=True)
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def write_config(self, about: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Writes the file of settings, with this launch; what `about` lacks of versions is that of this process.

        Raises:
            OSError: where it cannot be written.
        """
        about = {"schema": SCHEMA, "versions": versions(), "commit": commit(), **about}
        about |= {"launch": launch()} if launch() else {}
        write_text(self.config, to_yaml({"run": about, **settings}))

    def note_launch(self) -> None:
        """Notes which launch of torchrun it goes on under, if it does under another one.

        Raises:
            OSError: where it cannot be written.
        """
        about, settings = self._read()
        if about is not None and launch() is not None and self._launch() != launch():
            self.write_config(about, settings)

    def newest_checkpoint(self, last: int | None) -> Path | None:
        """The newest checkpoint of the run, verified, or its newest up to the step `last`; None where it has none yet.

        Raises:
            ValueError: where it has none up to `last`.
        """
        saved = checkpoints(self.checkpoints)
        fitting = [each for each in saved if last is None or step_of(each) <= last]
        if not fitting and last is not None:
            raise ValueError(
                f"no checkpoint in {self.checkpoints} is of step {last} or before, after which the schedules part"
            )
        if not fitting:
            return None
        verify(fitting[-1])
        return fitting[-1]

    def _resolved(self) -> Path:
        try:
            return self.path.resolve()
        except (OSError, RuntimeError) as error:
            raise FileExistsError(
                f"{self.path} cannot be a run's folder: it is a link that points at itself"
            ) from error

    def _launch(self) -> object:
        about, _ = self._read()
        return None if about is None else about.get("launch")

    def _read(self) -> tuple[Mapping[str, Any] | None, dict[str, Any]]:
        """What the file of settings says under `run`, None where it is none, and the settings."""
        settings = _settings(self.config)
        return _about(settings), {name: value for name, value in settings.items() if name != "run"}

    @abstractmethod
    def _what_it_holds(self) -> str:
        """Why it is not free, in a sentence."""


def _settings(file: Path) -> dict[str, Any]:
    try:
        return read_yaml(file)
    except ValueError:
        return {}


def _about(settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    about = settings.get("run")
    return about if isinstance(about, dict) and isinstance(about.get("schema"), int) else None
