"""Loss and perplexity weighted by tokens, the check that a fold changed nothing but roundings, and a text sample."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from foldrank.data.blocks import IGNORED


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Mean loss over predicted tokens."""

    loss: float
    """Nats per predicted token."""
    tokens: int
    """Predicted tokens: labels that count, without each sequence's first."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def evaluate_loss(model: nn.Module, sequences: Dataset, *, batch_size: int = 16) -> Evaluation:
    """The model's loss on `sequences`: the sum over all predicted tokens divided by their number.

    In eval mode; several processes share the work and all get the result. The batch size changes speed and memory, not the result (beyond float32 rounding).
    """
    sums: list[float] = []
    tokens = 0
    processes = PartialState()
    count = len(sequences)  # pyright: ignore[reportArgumentType]
    share = Subset(sequences, range(processes.process_index, count, processes.num_processes))
    for batch in _batches(model, share, batch_size):
        labels = batch["labels"][:, 1:]
        losses = token_losses(model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1], labels)
        sums += losses.double().sum(dim=1).tolist()
        tokens += int((labels != IGNORED).sum())
    shares: list[tuple[list[float], int]] = gather_object([(sums, tokens)])
    sums = [loss for one, _ in shares for loss in one]
    tokens = sum(count for _, count in shares)
    return Evaluation(loss=math.fsum(sums) / tokens, tokens=tokens)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each position in float32, 0 where the label does not count.

    Shape:
        logits (batch, time, vocabulary), labels (batch, time), result (batch, time).
    """
    flat = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view(labels.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """How far two models' outputs on the same tokens lie apart."""

    max_abs_logit: float
    """Largest difference of a logit."""
    argmax_agreement: float
    """Share of positions whose most likely next token is the same."""


@torch.no_grad()
def logits_of(model: nn.Module, sequences: Dataset, *, batch_size: int = 16) -> list[Tensor]:
    """The logits of each batch, on the CPU."""
    return [
        model(input_ids=batch["input_ids"], use_cache=False).logits.float().cpu()
        for batch in _batches(model, sequences, batch_size)
    ]


def drift(before: Iterable[Tensor], after: Iterable[Tensor]) -> Drift:
    """Compares logits batch by batch.

    Shape:
        each (batch, time, vocabulary).
    """
    largest, equal, positions = 0.0, 0, 0
    for one, other in zip(before, after, strict=True):
        largest = max(largest, float((one - other).abs().max()))
        same = one.argmax(-1) == other.argmax(-1)
        equal += int(same.sum())
        positions += same.numel()
    return Drift(max_abs_logit=largest, argmax_agreement=equal / positions)


@torch.no_grad()
def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    seed: int,
    max_new_tokens: int = 96,
    temperature: float = 0.7,
) -> str:
    """`prompt` and a continuation drawn from the model's 50 likeliest tokens; temperature 0 takes the likeliest."""
    set_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.eos_token_id}
    how |= {"do_sample": True, "temperature": temperature, "top_k": 50} if temperature else {"do_sample": False}
    generated: Any = model.generate(**inputs, **how)  # pyright: ignore[reportCallIssue]
    return str(tokenizer.decode(generated[0], skip_special_tokens=True))


def first(sequences: Dataset, count: int | None) -> Dataset:
    """The first `count` sequences, all where count is None or more than there are."""
    return sequences if count is None else Subset(sequences, range(min(count, len(sequences))))  # pyright: ignore[reportArgumentType]


def _batches(model: nn.Module, sequences: Dataset, batch_size: int) -> Iterator[dict[str, Tensor]]:
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for batch in DataLoader(sequences, batch_size=batch_size):
            yield {name: tensor.to(device) for name, tensor in batch.items()}
    finally:
        model.train(was_training)
