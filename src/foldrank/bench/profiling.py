"""Where a run's time goes: PyTorch's operators, by their own time and the shapes they were given."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MOST = 24
"""Operators that a record keeps of a run."""


def profiled(run: Callable[[], object]) -> dict[str, Any]:
    """Runs once more, under the profiler, which slows it down: what counts is how its parts compare.

    Returns:
        `seconds`, the operators' own time in all, on the GPU where one is used; and `operators`, those that took most:
        `name`, `shapes`, `calls`, `seconds`.
    """
    gpu = torch.cuda.is_available()
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])], record_shapes=True
    ) as measured:
        run()
    clock = "self_device_time_total" if gpu else "self_cpu_time_total"
    rows = [
        {
            "name": event.key,
            "shapes": " ".join("x".join(map(str, shape)) for shape in event.input_shapes if shape),
            "calls": event.count,
            "seconds": getattr(event, clock) / 1e6,
        }
        for event in measured.key_averages(group_by_input_shape=True)
    ]
    rows.sort(key=lambda row: -row["seconds"])
    return {"seconds": sum(row["seconds"] for row in rows), "operators": rows[:MOST]}
