"""The processes that share a run, as torchrun or `accelerate launch` started them, and what becomes of one."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage] - they are documented

RESTARTS = "TORCHELASTIC_RESTART_COUNT"

_timeout = timedelta(seconds=600)

HOWEVER_LONG = timedelta(days=365)

OF_GLOO = ("gloo", "Connection", "pair closure")
"""Each of its messages has one of these: mostly the path of its source, not where another exchange waited too long."""

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when the one that started it ends."""


def shared_by(device: str, patience: float = 600.0) -> PartialState:
    """The processes of a run; where there is no accelerator accelerate must be told, or each would be the only one.

    Args:
        device: `auto`, or `cpu`.
        patience: seconds that one waits for another.
    """
    global _timeout
    _timeout = timeout = timedelta(seconds=patience)
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    if is_restart() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not dist.is_initialized():
        # torchrun keeps its store over a restart (2.13), with the addresses of the processes that are gone.
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        attempt = PrefixStore(f"attempt-{os.environ[RESTARTS]}", store)
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        backend = "gloo" if on_cpu else None
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=timeout)
    return PartialState(cpu=on_cpu, timeout=timeout)


def group_on_cpu() -> Any:
    """All processes, as a group for which no GPU waits, and which is as patient as the other."""
    return dist.new_group(backend="gloo", timeout=_timeout)


def agreement() -> Callable[[int], int]:
    """From a number of each process to the largest, the same on all, which must all ask; no GPU waits for it."""
    if not (dist.is_available() and dist.is_initialized()):
        return lambda number: number
    group = group_on_cpu()

    def largest(number: int) -> int:
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=group)
        return int(numbers)

    return largest


def is_restart() -> bool:
    """Whether torchrun started these processes anew, because one of those before them was lost (`--max-restarts`)."""
    return "RANK" in os.environ and int(os.environ.get(RESTARTS, "0")) > 0


def launch() -> str | None:
    """What torchrun's `--rdzv-id` calls this launch, or `--standalone` does; None without such a name."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none") if "RANK" in os.environ else "none"
    return None if name == "none" else name


def end_with_launcher() -> None:
    """Lets a process that torchrun started get SIGTERM when torchrun is killed, which could not pass it on (Linux)."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def first_alone(processes: PartialState) -> Iterator[None]:
    """The first process goes through the block alone and the others after it, however long that takes, and also where
    it raises, as they will.

    `train.patience` is for steps; a corpus may take hours to prepare. A process that ends is noticed at once.
    """
    if processes.num_processes == 1:
        yield
        return
    group: Any = dist.new_group(backend="gloo", timeout=HOWEVER_LONG)
    if not processes.is_main_process:
        dist.barrier(group)
    try:
        yield
    finally:
        if processes.is_main_process:
            dist.barrier(group)


@contextmanager
def peers_watched(out: Path | None = None) -> Iterator[None]:
    """Says in one line that another process was lost, or does not answer, where a collective fails in the block.

    Args:
        out: the folder of what can be gone on with; None before there is such a folder.

    Raises:
        ConnectionError: in place of what the network's library says.
    """
    try:
        yield
    except RuntimeError as error:
        if not (dist.is_initialized() and dist.get_world_size() > 1 and _is_of_network(error)):
            raise
        rank = f"rank {dist.get_rank()} of {dist.get_world_size()}"
        cure = "start it again" if out is None else f"go on with --out {out} --resume"
        if _is_timeout(error):
            raise ConnectionError(
                f"{rank} waited in vain for another process, longer than train.patience: one of those that do not say "
                f"this has stalled, or the network between them; {cure}"
            ) from error
        raise ConnectionError(
            f"{rank} lost the connection to another process, which has "
            f"ended or cannot be reached (its own message tells why): {cure}"
        ) from error


def _is_timeout(error: RuntimeError) -> bool:
    return "timed out" in str(error).lower() or "timeout" in str(error).lower()


def _is_of_network(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(words in str(error) for words in OF_GLOO)
