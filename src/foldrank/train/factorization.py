"""Dense checkpoints at low rank: what the approximation of each weight costs in loss, rank by rank.

Where a budget of parameters is given in place of a rank, each layer gets the same share of its full rank (`even`,
surgery/ranks.py), or ranks by its spectrum (`spectra`): of all singular values the largest for their price are kept,

    sum over layers of |W_l - B_l A_l|^2  at least,  for  sum r_l (d_in + d_out)  as much as even ranks take,

on the inputs of a sample where the approximation is by activations: those of W C^(1/2).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldrank.core.config import Activation, LowRankConfig
from foldrank.core.inventory import count_parameters, inventory
from foldrank.data.stream import reopen_data
from foldrank.hf.families import convert_
from foldrank.surgery.approximation import Approximation, input_moments
from foldrank.train.evaluate import evaluate_loss, first
from foldrank.train.run_folder import RunFolder

Allocation = Literal["even", "spectra"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """How small a model is to become: one rank for all layers, or a share of its parameters."""

    rank: int | None = None
    budget: float | None = None
    allocation: Allocation = "even"
    """Of a budget."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Approximated:
    """A dense model at low rank."""

    target: Target
    smallest_rank: int
    largest_rank: int
    init: Approximation
    parameters: int
    layers: int
    loss: float
    """Before any training, in nats per predicted token."""


def approximations(
    load: Callable[[], PreTrainedModel],
    targets: Sequence[Target],
    inits: Sequence[Approximation],
    sample: Sequence[dict[str, Tensor]],
    validation: Dataset[dict[str, Tensor]],
    *,
    activation: Activation | None = None,
    batch_size: int,
    keep: Callable[[PreTrainedModel], None] = lambda _: None,
) -> Iterable[Approximated]:
    """The losses of a dense model for each target, by each kind of approximation.

    Args:
        load: gives the dense model, anew each time.
        targets: of every layer but the head.
        inits: kinds of approximation.
        sample: batches for `activations` and `regression`.
        validation: sequences to evaluate on.
        activation: between the factors.
        batch_size: sequences at a time.
        keep: is given each model.

    Raises:
        ValueError: for a model without low-rank classes, and a rank or budget that does not fit.
    """
    for target in targets:
        for init in inits:
            model = load()
            config = LowRankConfig(rank=target.rank, budget=target.budget, activation=activation)
            if target.allocation == "spectra":
                even = convert_(load(), config)
                assert even is not None
                names = {layer.name: layer.rank for layer in even.converted}
                ranks = spectral_ranks(model, names, None if init == "svd" else sample)
                config = LowRankConfig(rank=ranks, activation=activation)
            report = convert_(model, config, init=init, sample=sample)
            assert report is not None
            found = [layer.rank for layer in report.converted]
            loss = evaluate_loss(model, validation, batch_size=batch_size).loss
            keep(model)
            yield Approximated(
                target=target,
                smallest_rank=min(found),
                largest_rank=max(found),
                init=init,
                parameters=count_parameters(model),
                layers=len(report.converted),
                loss=loss,
            )


@torch.no_grad()
def spectral_ranks(
    model: PreTrainedModel, even: Mapping[str, int], sample: Sequence[dict[str, Tensor]] | None
) -> dict[str, int]:
    """Ranks by the spectra of a dense model's layers, with no more parameters than others.

    Args:
        model: the dense model.
        even: the ranks whose parameters are shared out anew, by the names of the layers.
        sample: batches whose inputs weigh the spectra; None: those of the weights alone.

    Returns:
        At least 1 for each layer, and never so much that its factors would be larger than its weight.
    """
    specs = inventory(model).linear_specs
    moments = None if sample is None else input_moments(model, list(even), sample)
    prices = {name: specs[name].in_features + specs[name].out_features for name in even}
    gains: list[tuple[float, str, int]] = []
    for name in even:
        weight = specs[name].weight_and_bias()[0].to(torch.float64)
        moment = None if moments is None else moments[name].to(weight.device)
        if moment is None and weight.shape[0] > weight.shape[1]:
            weight = weight.mT
        energies = torch.linalg.eigvalsh(weight @ (weight.mT if moment is None else moment @ weight.mT)).flip(0)
        most = specs[name].in_features * specs[name].out_features // prices[name]
        gains += [(float(energy) / prices[name], name, rank) for rank, energy in enumerate(energies[:most], start=1)]
    ranks = dict.fromkeys(even, 1)
    left = sum((even[name] - 1) * price for name, price in prices.items())
    for _, name, rank in sorted(gains, key=lambda gain: (-gain[0], gain[1], gain[2])):
        if rank == ranks[name] + 1 and prices[name] <= left:
            ranks[name] = rank
            left -= prices[name]
    return ranks


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
