"""`torch.compile` in training: one block, compiled once for all blocks, or a whole step in CUDA graphs.

Compiled regions are small on purpose (regional compilation): a model of 24 equal blocks compiles as fast as one block,
and nothing is compiled again where the number of blocks changes. Evaluation, generation and the check of the fold run
uncompiled, so that no shape of theirs is compiled for.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from foldrank.core.inventory import inventory
from foldrank.hf.foreign import one_line_of
from foldrank.recipes.train_config import TrainConfig

logger = logging.getLogger(__name__)

Compiled = Literal["none", "blocks", "step"]


def resolve_compile(train: TrainConfig, device: str) -> Compiled:
    """What is compiled on a device: `auto` is blocks where there are CUDA, a compiler, and no latents to keep.

    Args:
        train: its `compile`.
        device: kind of device, such as `cpu` or `cuda`.

    Raises:
        ValueError: for CUDA graphs without CUDA, and where a compiler is asked for and does not work.
    """
    if train.compile == "auto":
        # The policy that keeps latents runs in Python, through which no compiler looks.
        if device != "cuda" or train.activation_checkpointing == "latents":
            return "none"
        try:
            check_compiler("blocks", device)
        except ValueError as error:
            logger.warning(str(error))
            return "none"
        return "blocks"
    if train.compile == "step" and device != "cuda":
        raise ValueError(
            f"train.compile step records CUDA graphs, and the device here is {device}: take blocks or none"
        )
    check_compiler(train.compile, device)
    return train.compile


def check_compiler(how: Compiled, device: str) -> None:
    """Compiles one addition, so that a compiler that is missing is found before any work.

    Raises:
        ValueError: saying what the compiler said.
    """
    if how == "none":
        return
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:
        what = one_line_of(error)[:120]
        raise ValueError(
            f"train.compile {how}: torch.compile does not work here, set train.compile none ({what})"
        ) from error


def compile_(model: nn.Module, how: Compiled) -> tuple[str, ...]:
    """Lets the forward and backward pass of a model be compiled when they first run, in place; no key changes.

    Args:
        model: with transformer blocks in an `nn.ModuleList`.
        how: none; blocks, each called as one compiled region; step, the model as one, recorded as CUDA graphs, which
            wants every batch to have one shape.

    Returns:
        The names of the modules that are compiled, "" for the model.
    """
    if how == "none":
        return ()
    if how == "step":
        model.compile(mode="reduce-overhead", dynamic=False)
        return ("",)
    contents = inventory(model)
    name, _ = contents.blocks([*contents.low_rank_layers, *contents.linear_specs])
    blocks = {} if not name else dict(model.get_submodule(name).named_children())
    for block in blocks.values():
        block.compile()
    return tuple(f"{name}.{entry}" for entry in blocks)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Runs what is compiled as it was written."""
    with torch.compiler.set_stance("force_eager"):
        yield
