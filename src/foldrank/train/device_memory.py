"""How much memory a device has, what a recipe leaves open because of it, and whether the recipe's plan fits into it."""

import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from foldrank.recipes.schema import Recipe
from foldrank.train.accounting import Memory, evaluation_memory, memory

GIB = 1 << 30

ROOM = {"cuda": 0.9, "cpu": 0.5}
"""Share of the memory that a plan may take: the rest is for what it does not count, on a CPU for other programs too."""

LOGITS = 1 / 8
"""Share of the memory above which the logits of a micro-batch are computed by chunks, where a recipe leaves it open."""


SHORT = re.compile(r"out of memory|can't allocate memory|DefaultCPUAllocator")
"""What PyTorch says, as a RuntimeError, where memory is short."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, on a CPU or a GPU."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(SHORT.search(str(error))))


def device_memory(device: str) -> int:
    """Bytes that a process may have on the CPU ("cpu"), or on the GPU that is its own."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        physical = min(physical, int(limit)) if limit.isdecimal() else physical
    except OSError:  # not Linux, or another version of control groups
        pass
    return physical // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # the processes of torchrun on this machine


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on the GPU, or that the process has had in the memory of a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def room(device: torch.device) -> int:
    """Bytes of a device that a plan may take."""
    return int(ROOM.get(device.type, 0.9) * device_memory(str(device)))


def fit(recipe: Recipe, limit: int, *, processes: int = 1, vocab_size: int | None = None) -> Recipe:
    """The recipe with what it leaves open, micro-batch and chunked loss, chosen by its plan for a device.

    The loss goes by chunks where the logits of a micro-batch would take more than an eighth of the memory. The
    micro-batch is the largest whose plan fits; one sequence where none does.

    Args:
        recipe: all settings.
        limit: bytes that the plan may take (`room`).
        processes: that share a step's sequences.
        vocab_size: entries of the embedding; None: as many as the recipe says.

    Raises:
        ValueError: where a step's sequences cannot be shared out among the processes.
    """
    share = recipe.train.resolve_micro_batch_size(processes)
    sizes = [share] if recipe.train.micro_batch_size else [n for n in range(share, 0, -1) if share % n == 0]
    entries = vocab_size or recipe.nominal_vocab_size
    fitted = recipe
    for size in sizes:
        chunked = recipe.train.chunked_loss
        if chunked is None:
            chunked = 4 * entries * size * recipe.train.sequence_length > LOGITS * limit
        train = replace(recipe.train, micro_batch_size=size, chunked_loss=chunked)
        fitted = replace(recipe, train=train)
        if _peak(fitted, processes, vocab_size) <= limit:
            break
    return fitted


def check_memory(recipe: Recipe, limit: int, *, vocab_size: int | None = None) -> None:
    """Refuses a recipe that this device cannot hold, before anything is allocated.

    The plan is an upper bound, so that twice the memory is still tried; weights, gradients and optimizer are exact.

    Args:
        recipe: all settings; one process runs it.
        limit: bytes of the device.
        vocab_size: entries of the embedding; None: as many as the recipe says.

    Raises:
        ValueError: with the plan's figures and the settings to lower.
    """
    plan = memory(recipe, vocab_size=vocab_size)
    if _state(plan) > limit or plan.total > 2 * limit:
        raise ValueError(f"this needs {_figures(plan)}, of {limit / GIB:,.1f} GiB here: {_advice(recipe)}")


@contextmanager
def memory_explained(recipe: Recipe, device: str, *, processes: int, vocab_size: int) -> Iterator[None]:
    """Where memory runs out in the block, the plan's figures and the settings to lower are said.

    Raises:
        ValueError: in place of the error that says so.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        plan, limit = memory(recipe, gpus=processes, vocab_size=vocab_size), device_memory(device)
        raise ValueError(
            f"out of memory: the plan is {_figures(plan)}, of {limit / GIB:,.1f} GiB here: {_advice(recipe)}"
        ) from error


def _peak(recipe: Recipe, processes: int, vocab_size: int | None) -> int:
    plan = memory(recipe, gpus=processes, vocab_size=vocab_size).total
    return max(plan, evaluation_memory(recipe, gpus=processes, vocab_size=vocab_size))


def _state(plan: Memory) -> int:
    return plan.weights + plan.gradients + plan.optimizer


def _figures(plan: Memory) -> str:
    return (
        f"{_state(plan) / GIB:,.1f} GiB for weights, gradients and optimizer, up to {plan.total / GIB:,.1f} in a step"
    )


def _advice(recipe: Recipe) -> str:
    train = recipe.train
    ways = [f"train.micro_batch_size (now {train.micro_batch_size or train.batch_size})"]
    ways += ["train.sequence_length, or the model's sizes"]
    more = [] if train.activation_checkpointing else ["train.activation_checkpointing block"]
    more += [] if train.chunked_loss else ["train.chunked_loss true"]
    return f"lower {', '.join(ways)}" + (f"; or set {' and '.join(more)}" if more else "")
