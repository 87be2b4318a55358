"""What an optimizer costs beside the passes: bytes of its state, and FLOPs of a step."""

from torch import nn

from foldrank.optim.factor_optimizer import parameters_by_rule
from foldrank.optim.newton_schulz import STEPS
from foldrank.recipes.settings import TrainConfig


def optimizer_bytes(model: nn.Module, train: TrainConfig, *, shards: int = 1) -> int:
    """Bytes of the state that an optimizer keeps in float32, on one of `shards` that share it.

    AdamW keeps two averages, and a step counter for each tensor; Muon and Spectron one average, Spectron also a vector
    for each factor's norm, as long as a row of it.
    """
    averages = others = 0
    for rule, _, parameters in parameters_by_rule(model, train.optimizer):
        averages += sum(parameter.numel() for parameter in parameters) * (8 if rule == "adamw" else 4)
        if rule == "adamw":
            others += 4 * len(parameters)
        if rule == "spectron":
            others += sum(4 * parameter.shape[1] for parameter in parameters)
    return -(-averages // shards) + others


def optimizer_flops(model: nn.Module, train: TrainConfig) -> int:
    """FLOPs of a step of the optimizer that are products: 0 for AdamW.

    Each iteration of Newton and Schulz on an m x n matrix, m the smaller side, is X X^T, its square, and their product
    with X: 4 m^2 n + 2 m^3. Every process does all of them.
    """
    return sum(
        STEPS * (4 * min(matrix.shape) ** 2 * max(matrix.shape) + 2 * min(matrix.shape) ** 3)
        for rule, _, parameters in parameters_by_rule(model, train.optimizer)
        if rule != "adamw"
        for matrix in parameters
    )
