"""Seconds that a step takes at least: the largest of its products, its memory and its wire, from shapes alone.

Of memory a GPU reads its weights in each pass (forward, backward; once more where blocks are computed again), writes
and reads what the passes keep, and its optimizer reads and writes weights, gradients and state. What stays in a cache,
and what kernels read more than once, is not known here: the seconds of memory are a lower bound that is far from sharp.
"""

from dataclasses import replace
from typing import Any

from foldrank.recipes.schema import Recipe
from foldrank.train.accounting import memory as memory_of
from foldrank.train.accounting import training_flops
from foldrank.train.model import shape_of
from foldrank.train.optimizer_cost import optimizer_flops
from foldrank.train.sharding import check_processes
from foldrank.train.wire import wire


def step_time(recipe: Recipe, *, gpus: int, flops: float, memory: float, bandwidth: float) -> dict[str, Any]:
    """Seconds of a step by cause, their largest, and the bytes that each GPU sends.

    Args:
        recipe: all settings.
        gpus: processes, each with one GPU.
        flops: FLOP/s that one GPU reaches.
        memory: bytes a second between a GPU and its memory.
        bandwidth: bytes a second that a GPU sends to the others.

    Raises:
        ValueError: where a step's sequences cannot be shared out among the GPUs, or the layers cannot be split.
    """
    train, shares = recipe.train, check_processes(recipe.train, gpus)
    tokens = train.batch_size * train.sequence_length
    products = training_flops(recipe, gpus=shares).total * tokens / gpus
    products += optimizer_flops(shape_of(recipe), train)
    held = memory_of(recipe, gpus=shares)
    passes = train.batch_size // (shares * train.resolve_micro_batch_size(shares))
    reads = 3 if train.activation_checkpointing else 2
    moved = passes * (reads * (held.weights + held.communication) + 2 * (held.blocks + held.head_and_loss))
    moved += 2 * (held.weights + held.gradients + held.optimizer)
    sent = wire(recipe, gpus=gpus).sent
    seconds = {"products": products / flops, "memory": moved / memory, "wire": sent / bandwidth}
    return {**seconds, "at_least": max(seconds.values()), "bytes_sent": sent}


def beside_dense(recipe: Recipe, **figures: Any) -> list[dict[str, Any]]:
    """The step of a recipe, and that of the dense model of its shape, where one can be trained so."""
    ours = step_time(recipe, **figures)
    if recipe.low_rank is None or recipe.train.activation_checkpointing == "latents":
        return [{"model": "", **ours, "over_dense": None}]
    dense = replace(recipe, low_rank=None, train=replace(recipe.train, fold_at_start=False, split_stream=False))
    theirs = step_time(dense, **figures)
    return [
        {"model": "", **ours, "over_dense": ours["at_least"] / theirs["at_least"]},
        {"model": "dense", **theirs, "over_dense": None},
    ]
