"""Several processes that share their work, on this machine.

They are forked from one that has the imports done. torchrun, which starts each anew, is in test_processes.py; the agent
in which it watches, restarts and ends them is what `Launcher` runs.
"""

import contextlib
import gc
import json
import os
import signal
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from foldrank.cli import main
from tests.forked import forked


def begun(work: Callable[..., Any], folder: Path, *arguments: Any, processes: int) -> list[BaseProcess]:
    """So many processes that have begun to call a function; one alone is not told of others.

    What each prints is in `RANK.output` and `RANK.errors`, what the function returns in `RANK.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    return [
        forked(
            _one_of,
            work,
            folder / str(rank),
            {"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} if processes > 1 else {},
            arguments,
        )
        for rank in range(processes)
    ]


def together(work: Callable[..., Any], folder: Path, *arguments: Any, processes: int) -> list[Any]:
    """What a function returns in each of so many processes, as JSON gives it back."""
    started = begun(work, folder, *arguments, processes=processes)
    for process in started:
        process.join(600)
    said = [(folder / f"{rank}.errors").read_text()[-3000:] for rank in range(processes)]
    assert [process.exitcode for process in started] == [0] * processes, "\n".join(said)
    assert not any("redistributing" in each for each in said)  # what torch would say at each step
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def _one_of(work: Callable[..., Any], to: Path, variables: Mapping[str, str], arguments: Sequence[Any]) -> None:
    write_to(to)
    os.environ |= variables
    to.with_suffix(".json").write_text(json.dumps(work(*arguments)))


def write_to(file: Path) -> None:
    """What this process and those that it starts print is written beside the file; they have no GPU, and one thread."""
    for number, suffix in ((1, ".output"), (2, ".errors")):
        descriptor = os.open(file.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    gc.freeze()  # or each full collection goes through half a million objects of libraries


class Launcher:
    """The agent of one machine and its processes, each of which runs `foldrank` with the same arguments.

    Args:
        arguments: of the command line.
        folder: gets what they print and their numbers.
        variables: of the environment.
        how: fields of a `LaunchConfig`.
    """

    started: ClassVar[list["Launcher"]] = []

    def __init__(
        self, arguments: Sequence[str], folder: Path, *, variables: Mapping[str, str] | None = None, **how: Any
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._agent = forked(_agent, list(arguments), folder, variables or {}, how)
        self.started.append(self)

    @property
    def pid(self) -> int:
        """Also of the session that the agent and its processes share."""
        assert self._agent.pid is not None
        return self._agent.pid

    @property
    def ranks(self) -> dict[int, int]:
        """From the rank of each process that was started last to its number."""
        return {int(file.stem): int(file.read_text()) for file in self._folder.glob("*.pid")}

    def kill(self) -> None:
        """The agent and its processes, also those that are stopped."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def ended(self, seconds: float) -> int:
        """The agent's exit code."""
        self._agent.join(seconds)
        assert self._agent.exitcode is not None, f"it has not ended in time:\n{self.said}"
        return self._agent.exitcode

    @property
    def said(self) -> str:
        """What the agent and its processes have printed on standard error."""
        return (self._folder / "agent.errors").read_text()


def _agent(arguments: Sequence[str], folder: Path, variables: Mapping[str, str], how: dict[str, Any]) -> None:
    os.setsid()
    os.environ |= variables
    write_to(folder / "agent")
    defaults = {"run_id": uuid.uuid4().hex, "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    defaults |= {"min_nodes": 1, "max_nodes": 1, "max_restarts": 0, "start_method": "fork"}
    elastic_launch(LaunchConfig(**{**defaults, **how}), _trains)(arguments, folder)


def _trains(arguments: Sequence[str], folder: Path) -> None:
    number = folder / f"{os.environ['RANK']}.pid"
    number.with_suffix(".new").write_text(str(os.getpid()))
    number.with_suffix(".new").replace(number)
    raise SystemExit(main(list(arguments)))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def wait(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Until it holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)
