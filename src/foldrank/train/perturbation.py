"""What a residual does to a model before its first step: the loss of the first sequences with it and without."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.data import Dataset

from foldrank.core.inventory import low_rank_layers
from foldrank.train.evaluate import evaluate_loss

START_SEQUENCES = 32
"""So many of the first batch at most, whatever the number of processes and of sequences at a time."""


def start_losses(model: nn.Module, batch: Dataset, *, batch_size: int) -> tuple[float, float | None]:
    """The loss of an untrained model in nats per token, and that without its residuals; None where it has none."""
    with_residual = evaluate_loss(model, batch, batch_size=batch_size).loss
    if all(layer.residual is None for layer in low_rank_layers(model).values()):
        return with_residual, None
    with _without_residuals(model):
        return with_residual, evaluate_loss(model, batch, batch_size=batch_size).loss


@contextmanager
def _without_residuals(model: nn.Module) -> Iterator[None]:
    residuals = {layer: layer.residual for layer in low_rank_layers(model).values()}
    try:
        for layer in residuals:
            layer.residual = None
        yield
    finally:
        for layer, residual in residuals.items():
            layer.residual = residual
