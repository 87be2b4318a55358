"""What an optimizer costs beside the passes: bytes of its state, and FLOPs of a step."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import nn

from foldrank.optim.factor_optimizer import parameters_by_rule
from foldrank.optim.newton_schulz import STEPS
from foldrank.recipes.train_config import TrainConfig
from foldrank.train.stand_ins import times_of


def optimizer_bytes(
    model: nn.Module, train: TrainConfig, *, shards: int = 1, parts: Mapping[int, Sequence[int]] = MappingProxyType({})
) -> int:
    """Bytes of the state that an optimizer keeps in float32, on one of `shards` that share it.

    `parts` has the shape that a parameter has in one process, by its id, where it is split (`parts_in`).

    AdamW keeps two averages, and a step counter for each tensor; Muon and Spectron one average, Spectron also a vector
    for each factor's norm, as long as a row of it.
    """
    averages = others = 0
    times = times_of(model)
    for rule, _, parameters in parameters_by_rule(model, train.optimizer):
        for parameter in parameters:
            number = times.get(id(parameter), 1)
            numbers = number * math.prod(parts.get(id(parameter), parameter.shape))
            averages += numbers * (8 if rule == "adamw" else 4)
            if rule == "adamw":
                others += number * 4
            if rule == "spectron":
                others += number * 4 * parameter.shape[1]
    return -(-averages // shards) + others


def optimizer_flops(model: nn.Module, train: TrainConfig) -> int:
    """FLOPs of a step of the optimizer that are products: 0 for AdamW.

    Each iteration of Newton and Schulz on an m x n matrix, m the smaller side, is X X^T, its square, and their product
    with X: 4 m^2 n + 2 m^3. Every process does all of them.
    """
    times = times_of(model)
    return sum(
        times.get(id(matrix), 1) * STEPS * (4 * min(matrix.shape) ** 2 * max(matrix.shape) + 2 * min(matrix.shape) ** 3)
        for rule, _, parameters in parameters_by_rule(model, train.optimizer)
        if rule != "adamw"
        for matrix in parameters
    )
