"""How much memory a device has, and whether a recipe's plan fits into it."""

import os
from pathlib import Path

import torch

from foldrank.recipes.schema import Recipe
from foldrank.train.accounting import memory

GIB = 1 << 30


def device_memory(device: str) -> int:
    """Bytes that a process may have on the CPU ("cpu"), or on the GPU that is its own."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return min(physical, int(limit)) if limit.isdecimal() else physical
    except OSError:  # not Linux, or another version of control groups
        return physical


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
    state = plan.weights + plan.gradients + plan.optimizer
    if state > limit or plan.total > 2 * limit:
        raise ValueError(
            f"this needs {state / GIB:,.1f} GiB for weights, gradients and optimizer and up to {plan.total / GIB:,.1f} "
            f"GiB in a step, of {limit / GIB:,.1f} GiB here: lower the model's sizes, train.micro_batch_size "
            "or train.sequence_length, or set train.activation_checkpointing"
        )
