"""The command line in processes of their own, to be killed."""

import multiprocessing
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from foldrank.cli import main

Start = Callable[..., BaseProcess]


@pytest.fixture(scope="session")
def start() -> Start:
    """Runs the command in a process of its own, forked from one that has the imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["foldrank.train.pretrain", "foldrank.compare.worker", "foldrank.cli"])

    def run(*arguments: object, **limits: object) -> BaseProcess:
        process = context.Process(target=_command, args=([str(argument) for argument in arguments],), kwargs=limits)
        process.start()
        return process

    return run


def _command(
    arguments: list[str], file_bytes: int | None = None, errors: Path | None = None, more_bytes: int | None = None
) -> None:
    import torch

    torch.set_num_threads(1)
    if errors is not None:
        sys.stderr = errors.open("w", buffering=1)
    if file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if more_bytes is not None:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more_bytes, now + more_bytes))
    raise SystemExit(main(arguments))
