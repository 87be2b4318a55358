"""Processes forked from one that has the imports done: these take longer than most of what is tested in them."""

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

PRELOADED = (
    "foldrank.cli",
    "foldrank.compare.worker",
    "foldrank.finetune.finetune",
    "foldrank.report.svg",
    "foldrank.runs.page",
    "foldrank.train.pretrain",
    "torch.distributed.launcher.api",
    "trl.trainer.sft_trainer",
)


def forked(target: Callable[..., object], *arguments: object, **named: object) -> BaseProcess:
    """A process that has begun to call a function of a module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))  # heeded once, by the first that is started
    process = context.Process(target=target, args=arguments, kwargs=named)
    process.start()
    return process


@pytest.fixture(scope="session")
def start() -> Start:
    """Runs the command line in a process of its own, to be killed."""
    return lambda *arguments, **limits: forked(_command, [str(argument) for argument in arguments], **limits)


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
