"""Bytes that the processes of a run exchange in a step, by what is done with them, from shapes alone.

Letters as in accounting.py; P parameters, of which P_b are the blocks', N processes, S sequences, k passes a step, w
bytes of a number in a matrix product. A tensor counts once, as large as it is when it is whole:

    DDP               summed     4 P, once a step
    FSDP              gathered   k (2 w P_b + 4 (P - P_b)): blocks for either pass, all else once for both
                      scattered  4 P, once a step; of each weight the rows are filled up to a multiple of N in all three
    tensor parallel   summed     w S T (f F + b) of a block: F numbers that the forward pass sums, b the backward pass
                                 f = 2 where activation checkpointing computes a block again, else 1
                      of low rank F = 2 r, b = 5 r; of dense layers F = 2 d, b = 2 d
    with the stream   F = 7 r, b = 7 r; four bytes of each norm and token as well, in either pass
                      joined     8 S T d: what leaves the last block, and the gradient of what the first one gets
    both              of each group of processes that split layers, S / N in place of S; and FSDP of its part, P and
                      P_b, among the N groups

A ring sends (N - 1) / N of what is gathered or scattered from each process, and twice that of what is summed (Patarasu
and Yuan, J. Parallel Distrib. Comput. 69, 2009). What has few bytes is not counted: the gradient's norm,
and the buffers that DDP sends in each pass.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from foldrank.core.inventory import count_parameters
from foldrank.recipes.schema import Recipe
from foldrank.recipes.train_config import TrainConfig
from foldrank.train.block_costs import widths
from foldrank.train.model import shape_of
from foldrank.train.sharding import NORM, check_processes, inputs_in_common, parts_in, plan_of
from foldrank.train.stand_ins import blocks_of, stands_for, total


@dataclass(frozen=True, kw_only=True, slots=True)
class Wire:
    """Bytes of a step, as large as the tensors are when they are whole."""

    summed: int
    gathered: int
    scattered: int
    joined: int
    """Bytes of the residual stream that processes which split it gather."""
    summing: int
    """Processes that sum, and join."""
    sharing: int
    """Processes that gather and scatter."""

    @property
    def sent(self) -> int:
        """Bytes that each process sends, around rings."""
        summed = (2 * self.summed + self.joined) * (self.summing - 1) // self.summing
        return summed + (self.gathered + self.scattered) * (self.sharing - 1) // self.sharing


def wire(recipe: Recipe, *, gpus: int, vocab_size: int | None = None) -> Wire:
    """What the processes of a run of the recipe exchange in a step.

    Args:
        recipe: all settings.
        gpus: processes, each with one GPU.
        vocab_size: entries of the embedding; None: as many as the recipe says.

    Raises:
        ValueError: where a step's sequences cannot be shared out among the GPUs, or the layers cannot be split.
    """
    return model_wire(shape_of(recipe, vocab_size), recipe.train, gpus=gpus)


def model_wire(model: PreTrainedModel, train: TrainConfig, *, gpus: int) -> Wire:
    """As `wire`, of a model on any device."""
    summed = gathered = scattered = 0
    shares, split = check_processes(train, gpus), train.tensor_parallel > 1
    sharded = shares > 1 and train.sharding == "fsdp"
    if split:
        summed = _summed_by_parts(model, train, shares)
    elif not sharded and gpus > 1:
        summed = 4 * total(model, count_parameters)
    if sharded:
        width, parts = 2 if train.dtype == "bfloat16" else 4, parts_in(model, train)
        passes = train.batch_size // (shares * train.resolve_micro_batch_size(shares))
        everything = total(model, lambda module: _filled_up(module, shares, parts))
        in_blocks = sum(stands_for(block) * _filled_up(block, shares, parts) for block in blocks_of(model))
        gathered = passes * (2 * width * in_blocks + 4 * (everything - in_blocks))
        scattered = 4 * everything
    tokens = train.batch_size // shares * train.sequence_length
    return Wire(
        summed=summed,
        gathered=gathered,
        scattered=scattered,
        joined=8 * tokens * widths(model.config).d if train.split_stream else 0,
        summing=train.tensor_parallel if split else gpus,
        sharing=shares,
    )


def numbers_summed(block: nn.Module, plan: dict[str, str]) -> tuple[int, int]:
    """Numbers a token that processes sum, which share the layers of a block: of the forward and the backward pass."""
    forward = backward = 0
    common = inputs_in_common(plan)
    for name, way in plan.items():
        layer: Any = block.get_submodule(name)
        if way == "rowwise":
            forward += layer.out_features
        elif way == "colwise" and name.rpartition(".")[0] not in common:
            backward += layer.in_features
    for name in common:
        first = next(layer for layer in plan if layer.startswith(f"{name}.") and plan[layer] == "colwise")
        layer = block.get_submodule(first)
        backward += layer.in_features
    return forward, backward


def _summed_by_parts(model: PreTrainedModel, train: TrainConfig, shares: int) -> int:
    width, plan = 2 if train.dtype == "bfloat16" else 4, plan_of(model, train)
    again = 2 if train.activation_checkpointing else 1
    norms = sum(way == NORM for way in plan.values())
    of_a_token = 0
    for block in blocks_of(model):
        forward, backward = numbers_summed(block, plan)
        of_a_token += stands_for(block) * (width * (again * forward + backward) + 4 * (again + 1) * norms)
    return of_a_token * train.batch_size // shares * train.sequence_length


def _filled_up(module: nn.Module, shards: int, parts: Mapping[int, Sequence[int]]) -> int:
    """Numbers of a module's parameters in a process, the rows of each filled up so that all shards are of one size."""
    shapes = (parts.get(id(parameter), parameter.shape) for parameter in module.parameters())
    return sum(-(-shape[0] // shards) * shards * math.prod(shape[1:]) for shape in shapes)
