"""Dense checkpoints at low rank: what the approximation of each weight costs in loss, rank by rank."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldrank.core.approximation import Approximation
from foldrank.core.config import LowRankConfig
from foldrank.core.inventory import count_parameters
from foldrank.data.stream import reopen_data
from foldrank.hf.families import convert_
from foldrank.train.evaluate import evaluate_loss, first
from foldrank.train.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True, slots=True)
class Approximated:
    """A dense model at one rank."""

    rank: int
    init: Approximation
    parameters: int
    layers: int
    loss: float
    """Before any training, in nats per predicted token."""


def approximations(
    load: Callable[[], PreTrainedModel],
    ranks: Sequence[int],
    inits: Sequence[Approximation],
    sample: Sequence[dict[str, Tensor]],
    validation: Dataset[dict[str, Tensor]],
    *,
    batch_size: int,
    keep: Callable[[PreTrainedModel], None] = lambda _: None,
) -> Iterable[Approximated]:
    """The losses of a dense model at each rank, by each kind of approximation.

    Args:
        load: gives the dense model, anew each time.
        ranks: of every layer but the head.
        inits: kinds of approximation.
        sample: batches for `activations`.
        validation: sequences to evaluate on.
        batch_size: sequences at a time.
        keep: is given each model.

    Raises:
        ValueError: for a model without low-rank classes, and a rank that does not fit.
    """
    for rank in ranks:
        for init in inits:
            model = load()
            report = convert_(model, LowRankConfig(rank=rank), init=init, sample=sample)
            assert report is not None
            loss = evaluate_loss(model, validation, batch_size=batch_size).loss
            keep(model)
            yield Approximated(
                rank=rank,
                init=init,
                parameters=count_parameters(model),
                layers=len(report.converted),
                loss=loss,
            )


def batches(sequences: Dataset[dict[str, Tensor]], batch_size: int, device: str) -> list[dict[str, Any]]:
    """Sequences as `factorize_` takes them for a sample, on the model's device."""
    return [
        {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
        for batch in DataLoader(sequences, batch_size=batch_size)
    ]


def training_sample(run: RunFolder, tokenizer: PreTrainedTokenizerBase, count: int) -> Dataset[dict[str, Tensor]]:
    """The first sequences that a run was trained on.

    Raises:
        ValueError: where they cannot be had any more.
    """
    config = run.read_config()
    if config.data is None:
        raise ValueError(f"the run in {run.path} is of foldrank 0.1 and does not tell its data: name a text")
    train = config.recipe.train
    data = reopen_data(config.recipe.data, config.data, tokenizer=tokenizer)
    return first(data.training(train.sequences, seed=config.recipe.seed, num_sequences=count), count)
