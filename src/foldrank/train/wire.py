"""Bytes that the processes of a run exchange in a step, by what is done with them, from shapes alone.

Letters as in accounting.py; P parameters, of which P_b are the blocks', N processes, S sequences, k passes a step, w
bytes of a number in a matrix product. A tensor counts once, as large as it is when it is whole:

    DDP               summed     4 P, once a step
    FSDP              gathered   k (2 w P_b + 4 (P - P_b)): blocks for either pass, all else once for both
                      scattered  4 P, once a step; of each weight the rows are filled up to a multiple of N in all three
    tensor parallel   summed     w S T (f F + b) of a block: F numbers that the forward pass sums, b the backward pass
                                 f = 2 where activation checkpointing computes a block again, else 1
                      of low rank F = 2 r, b = 5 r; of dense layers F = 2 d, b = 2 d

A ring sends (N - 1) / N of what is gathered or scattered from each process, and twice that of what is summed (Patarasu
and Yuan, J. Parallel Distrib. Comput. 69, 2009). What has few bytes is not counted: the gradient's norm,
and the buffers that DDP sends in each pass.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from foldrank.core.inventory import count_parameters
from foldrank.recipes.schema import Recipe
from foldrank.recipes.settings import TrainConfig
from foldrank.train.model import shape_of
from foldrank.train.sharding import inputs_in_common, plan_of
from foldrank.train.stand_ins import blocks_of, stands_for, times_of, total


@dataclass(frozen=True, kw_only=True, slots=True)
class Wire:
    """Bytes of a step, as large as the tensors are when they are whole."""

    summed: int
    gathered: int
    scattered: int
    processes: int

    @property
    def sent(self) -> int:
        """Bytes that each process sends, around a ring."""
        whole = 2 * self.summed + self.gathered + self.scattered
        return whole * (self.processes - 1) // self.processes


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
    if train.tensor_parallel > 1:
        summed = _summed_by_parts(model, train)
    elif gpus > 1 and train.sharding == "fsdp":
        width = 2 if train.dtype == "bfloat16" else 4
        passes = train.batch_size // (gpus * train.resolve_micro_batch_size(gpus))
        everything = _filled_up(model, gpus)
        in_blocks = sum(stands_for(block) * _filled_up(block, gpus) for block in blocks_of(model))
        gathered = passes * (2 * width * in_blocks + 4 * (everything - in_blocks))
        scattered = 4 * everything
    elif gpus > 1:
        summed = 4 * total(model, count_parameters)
    return Wire(summed=summed, gathered=gathered, scattered=scattered, processes=gpus)


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


def _summed_by_parts(model: PreTrainedModel, train: TrainConfig) -> int:
    width, plan = 2 if train.dtype == "bfloat16" else 4, plan_of(model)
    again = 2 if train.activation_checkpointing else 1
    numbers = 0
    for block in blocks_of(model):
        forward, backward = numbers_summed(block, plan)
        numbers += stands_for(block) * (again * forward + backward)
    return width * train.batch_size * train.sequence_length * numbers


def _filled_up(module: nn.Module, shards: int) -> int:
    """Numbers of a module's parameters, the rows of each filled up so that all shards are of one size."""
    times = times_of(module) if isinstance(module, PreTrainedModel) else {}
    return sum(
        times.get(id(parameter), 1) * -(-parameter.shape[0] // shards) * shards * parameter[0].numel()
        for parameter in module.parameters()
    )
