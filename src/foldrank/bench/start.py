"""From a recipe to a model with its initial weights on its device: time, and memory over that of the weights."""

import multiprocessing
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from foldrank.bench.interleaved import interleaved_timing, timed
from foldrank.bench.record import Findings, Gate
from foldrank.bench.settings import Settings
from foldrank.core.inventory import count_parameters
from foldrank.train.model import build_model, meta_model


def run(settings: Settings) -> Findings:
    """Starts every method's model interleaved.

    Raises:
        ValueError: where two starts differ, one on the CPU and one on the device.
    """
    gates = tuple(_gate(settings, method) for method in settings.method_names)
    timers = {method: timed(partial(_start, settings, method), settings.device) for method in settings.method_names}
    figures = interleaved_timing(timers, settings.rounds, warm_up=1)
    for method in settings.method_names:
        shape = meta_model(settings.recipe_of(method), settings.vocabulary_size())
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            idle, peak = pool.apply(_memory, (settings, method))
        weights = sum(parameter.nbytes for parameter in shape.parameters())
        figures[method] |= {
            "parameters": count_parameters(shape),
            "weights_bytes": weights,
            "idle_bytes": idle,
            "peak_bytes": peak,
            "over_weights": (peak - idle) / weights,
        }
    return Findings(cases={"start": figures}, gates=gates)


def _start(settings: Settings, method: str) -> PreTrainedModel:
    return build_model(settings.recipe_of(method), settings.vocabulary_size(), device=settings.device)


def _gate(settings: Settings, method: str) -> Gate:
    here, there = (
        build_model(settings.recipe_of(method), settings.vocabulary_size(), device=device)
        for device in ("cpu", settings.device)
    )
    pairs = zip(here.parameters(), there.parameters(), strict=True)
    difference = max(float((one.detach() - other.detach().cpu()).abs().max()) for one, other in pairs)
    return Gate(
        what=f"{method} started twice, on the CPU and on {settings.device}", difference=difference, bound=0.0
    ).check()


def _memory(settings: Settings, method: str) -> tuple[int, int]:
    """Memory of this process, on a GPU what is allocated there, before a start and at its peak."""
    meta_model(settings.recipe_of(method), settings.vocabulary_size())
    if settings.device == "cuda":
        torch.cuda.init()
        _start(settings, method)
        return 0, torch.cuda.max_memory_allocated()
    idle = peak_resident_bytes()
    _start(settings, method)
    return idle, peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The largest resident memory of this process so far."""
    # Not getrusage, whose figure a process inherits from the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
