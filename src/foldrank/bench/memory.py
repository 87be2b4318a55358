"""What a training step holds: weights, gradients, optimizer state, activations, and the peak of all."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from foldrank.bench.record import Findings
from foldrank.bench.settings import Settings
from foldrank.bench.trained_model import TrainedModel, gates


def run(settings: Settings) -> Findings:
    """Measures one method after the other; bytes do not scatter, so once is enough.

    Raises:
        ValueError: where the numerics gate fails.
    """
    passed = tuple(gates(settings))
    figures: dict[str, dict[str, Any]] = {}
    for method in settings.method_names:
        figures[method] = _of(TrainedModel(settings, method))
        base = figures[settings.method_names[0]]
        for name in ("peak", "step_peak"):
            figures[method][f"{name}_ratio"] = figures[method][f"{name}_bytes"] / base[f"{name}_bytes"]
    return Findings(cases={"step": figures}, gates=passed)


def _of(trained: TrainedModel) -> dict[str, Any]:
    trained.step()  # makes the optimizer's state
    saved: list[object] = []
    activations, _ = allocated(lambda: saved.append(trained.loss()), trained.device)
    saved.clear()
    _, step_peak = allocated(trained.step, trained.device)
    weights = sum(parameter.nbytes for parameter in trained.model.parameters())
    optimizer = sum(
        value.nbytes
        for state in trained.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    return {
        "weights_bytes": weights,
        "gradients_bytes": weights,  # of the same shapes and dtype
        "optimizer_bytes": optimizer,
        "activations_bytes": activations,
        "step_peak_bytes": step_peak,
        "peak_bytes": weights + optimizer + step_peak,
    }


def allocated(run: Callable[[], object], device: str) -> tuple[int, int]:
    """Bytes that `run` allocates and leaves, and the largest sum of them on the way, above what there was.

    As PyTorch's profiler counts them on a CPU, and its allocator on a GPU.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    results: Any = profiled.profiler and profiled.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return live, peak
