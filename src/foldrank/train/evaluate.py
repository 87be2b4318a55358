"""Loss and perplexity weighted by tokens, the check that a fold changed nothing but roundings, and a text sample."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from foldrank.data.mixture import ConcatenatedSources
from foldrank.data.sequences import IGNORED
from foldrank.hf.foreign import foreign
from foldrank.hf.tokenizers import embedding_size
from foldrank.train.chunked_loss import is_chunked, token_losses_by_chunks
from foldrank.train.compilation import uncompiled
from foldrank.train.metrics import perplexity_of
from foldrank.train.sharding import share_of

COMPILED_FROM = 512
"""New tokens from which on a GPU compiles the model, which takes as long as some hundreds of them (not measured)."""

MOST_LOGITS = 1 << 23
"""Numbers that the check of a fold keeps of the unfolded model: 32 MiB in float32."""


OTHER_INPUTS = ("attention_mask", "position_ids")
"""What a batch may give the model besides its tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The loss of each sequence: summed over its predicted tokens, and how many these are."""

    sums: Sequence[float]
    """Nats per sequence."""
    counts: Sequence[int]
    """Predicted tokens per sequence: labels that count, without the sequence's first."""
    bytes_of_text: int | None = None
    """That the predicted tokens stand for; None where their tokenizer does not tell."""

    @property
    def bits_per_byte(self) -> float | None:
        """Bits for each byte of text, the end of a document counted in the bits: it compares across tokenizers."""
        return math.fsum(self.sums) / math.log(2) / self.bytes_of_text if self.bytes_of_text else None

    @property
    def tokens(self) -> int:
        """Predicted tokens of all sequences."""
        return sum(self.counts)

    @property
    def loss(self) -> float:
        """Nats per predicted token: the sum over all of them divided by their number."""
        return math.fsum(self.sums) / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity_of(self.loss)

    def legacy_perplexity(self, batch_size: int) -> float:
        """As the published code of this line of work computes it, to stand beside its tables; see docs/perplexity.md.

        exp(sum of the batches' mean losses / (number of batches + 1)): it depends on the batch size and is too low.
        """
        means = [
            math.fsum(self.sums[start : start + batch_size]) / count
            for start in range(0, len(self.sums), batch_size)
            if (count := sum(self.counts[start : start + batch_size]))  # a document may be of one token
        ]
        return perplexity_of(math.fsum(means) / (len(means) + 1))


def check_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, positions: int) -> str | None:
    """Refuses a tokenizer with more tokens than the embedding has, and more positions than the model has learned.

    Returns:
        What to tell the user of rotary positions beyond those that the model was made for; None where there are none.

    Raises:
        ValueError: saying what does not fit.
    """
    embedding: Any = model.get_input_embeddings()
    entries = embedding.weight.shape[0]
    if (needed := embedding_size(tokenizer)) > entries:
        raise ValueError(
            f"the tokenizer has ids up to {needed - 1} and the model's embedding {entries} entries: they are not of "
            "one checkpoint"
        )
    most = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(most, int) or positions <= most:
        return None
    if _learns_positions(model):
        raise ValueError(f"{positions:,} positions are more than the {most:,} that this model has learned: take fewer")
    return f"{positions:,} positions are more than the {most:,} that this model was made for"


def _learns_positions(model: PreTrainedModel) -> bool:
    return not any("rotary" in name for name, _ in model.named_modules())


@torch.no_grad()
def evaluate_loss(
    model: nn.Module,
    sequences: Dataset,
    *,
    batch_size: int = 16,
    token_bytes: Tensor | None = None,
    collate: Callable[[list[Any]], dict[str, Tensor]] | None = None,
) -> Evaluation:
    """The model's loss on `sequences`, in eval mode.

    Several processes share the work and all get the result. Neither their number nor the batch size changes it (beyond
    float32 rounding).

    Args:
        model: a language model, on any device.
        sequences: with `input_ids` and `labels`.
        batch_size: sequences at a time.
        token_bytes: bytes of text by token id (`foldrank.hf.token_bytes`), for bits per byte.
        collate: makes a batch of sequences; None where all have one length.

    Raises:
        ValueError: where no label counts.
    """
    total = len(sequences)  # pyright: ignore[reportArgumentType]
    share, shares = share_of(model)
    mine = range(share, total, shares)
    # A process with one fewer takes the first once more, and forgets it: sharded ones gather weights in each pass.
    short = [0] * (len(range(0, total, shares)) - len(mine))
    measured: list[tuple[int, float, int, int]] = []
    for batch in _batches(model, Subset(sequences, [*mine, *short]), batch_size, collate):
        labels = batch["labels"][:, 1:]
        losses = _losses(model, batch, labels)
        sums, counts = losses.double().sum(dim=1).tolist(), (labels != IGNORED).sum(dim=1).tolist()
        sizes = [0] * len(sums) if token_bytes is None else _bytes_of(labels.cpu(), token_bytes)
        measured += zip(mine[len(measured) :], sums, counts, sizes, strict=False)
    # Those who split layers have all measured the same.
    everyone = sorted({each[0]: each for each in gather_object(measured)}.values())
    if not any(count for _, _, count, _ in everyone):
        raise ValueError(f"there is no token to predict in these {total} sequences")
    return Evaluation(
        sums=[loss for _, loss, _, _ in everyone],
        counts=[count for _, _, count, _ in everyone],
        bytes_of_text=None if token_bytes is None else sum(size for *_, size in everyone),
    )


def _bytes_of(labels: Tensor, token_bytes: Tensor) -> list[int]:
    counts = labels != IGNORED
    return (token_bytes[labels.where(counts, 0)] * counts).sum(dim=1).tolist()


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each position in at least float32, 0 where the label does not count.

    Shape:
        logits (batch, time, vocabulary), labels (batch, time), result (batch, time).
    """
    wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    flat = F.cross_entropy(wide, labels.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view(labels.shape)


def by_source(evaluation: Evaluation, sequences: Dataset) -> dict[str, Evaluation]:
    """The parts of an evaluation of a mixture, by the name of the source; none of anything else."""
    if not isinstance(sequences, ConcatenatedSources):
        return {}
    parts = {
        name: Evaluation(sums=evaluation.sums[at.start : at.stop], counts=evaluation.counts[at.start : at.stop])
        for name, at in sequences.ranges().items()
    }
    return {name: part for name, part in parts.items() if part.tokens}


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldError:
    """How far two models' outputs on the same tokens lie apart."""

    max_abs_error: float
    """Largest difference of a logit."""
    argmax_agreement: float
    """Share of positions whose most likely next token is the same."""


@torch.no_grad()
def logits_of(
    model: nn.Module, sequences: Dataset, *, batch_size: int = 16, most: int = MOST_LOGITS
) -> Iterator[Tensor]:
    """The logits of each batch in turn, on the CPU: of its first positions where all would be more than `most`."""
    total = len(sequences)  # pyright: ignore[reportArgumentType]
    for batch in _batches(model, sequences, batch_size):
        length = batch["input_ids"].shape[1]
        positions = min(length, max(1, most // (total * model.config.vocab_size)))  # pyright: ignore
        # Causal: what comes behind changes nothing, and is not computed.
        batch = {name: tensor[:, :positions] for name, tensor in batch.items()}
        yield _logits(model, batch).float().cpu()


def fold_error(before: Iterable[Tensor], after: Iterable[Tensor]) -> FoldError:
    """Compares logits batch by batch.

    Shape:
        each (batch, time, vocabulary).
    """
    largest, equal, positions = torch.zeros(()), 0, 0
    for one, other in zip(before, after, strict=True):
        largest = torch.maximum(largest, (one - other).abs().max())  # which NaN does not slip through
        same = one.argmax(-1) == other.argmax(-1)
        equal += int(same.sum())
        positions += same.numel()
    return FoldError(max_abs_error=float(largest), argmax_agreement=equal / positions)


@torch.no_grad()
def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    seed: int,
    max_new_tokens: int = 96,
    temperature: float = 0.7,
    static_cache: bool = False,
) -> str:
    """`prompt` and a continuation drawn from the model's 50 likeliest tokens; temperature 0 takes the likeliest.

    Args:
        model: a language model, on any device.
        tokenizer: its tokenizer.
        prompt: the text to continue.
        seed: of the draw.
        max_new_tokens: tokens at most; fewer where the model has learned no more positions.
        temperature: by which logits are divided.
        static_cache: keep the attention's keys and values in memory of a fixed size; on a GPU transformers then
            compiles the model and records CUDA graphs, where the tokens are so many that it pays.

    Raises:
        ValueError: for a prompt without tokens, or a model whose outputs are not finite.
    """
    set_seed(seed)
    with foreign(f"this tokenizer cannot read the prompt {prompt!r}"):
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    if not inputs["input_ids"].numel():
        raise ValueError(f"the prompt {prompt!r} has no tokens that this tokenizer knows")
    if _learns_positions(model):
        left = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
        max_new_tokens = max(1, min(max_new_tokens, left))
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.eos_token_id}
    how |= {"do_sample": True, "temperature": temperature, "top_k": 50} if temperature else {"do_sample": False}
    how |= {"cache_implementation": "static", "disable_compile": max_new_tokens < COMPILED_FROM} if static_cache else {}
    # In training mode a model with activation checkpointing sees one token alone.
    with _eval_mode(model), nullcontext() if static_cache else uncompiled():
        if not torch.isfinite(_logits(model, dict(inputs))).all():
            raise ValueError("the model's outputs are not finite: its weights hold NaN or infinity")
        generated: Any = model.generate(**inputs, **how)  # pyright: ignore[reportCallIssue]
    return str(tokenizer.decode(generated[0], skip_special_tokens=True))


def first(sequences: Dataset, count: int | None) -> Dataset:
    """The first `count` sequences, all where count is None or more than there are."""
    return sequences if count is None else Subset(sequences, range(min(count, len(sequences))))  # pyright: ignore[reportArgumentType]


def _losses(model: nn.Module, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
    if is_chunked(model):
        others = {name: batch[name] for name in OTHER_INPUTS if name in batch}
        return token_losses_by_chunks(model, batch["input_ids"], labels, **others)  # pyright: ignore[reportArgumentType]
    return token_losses(_logits(model, batch)[:, :-1], labels)


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    others = {name: batch[name] for name in OTHER_INPUTS if name in batch}
    return model(input_ids=batch["input_ids"], use_cache=False, **others).logits


def _batches(
    model: nn.Module, sequences: Dataset, batch_size: int, collate: Callable[[list[Any]], Any] | None = None
) -> Iterator[dict[str, Tensor]]:
    device = next(model.parameters()).device
    with _eval_mode(model), uncompiled():
        for batch in DataLoader(sequences, batch_size=batch_size, collate_fn=collate):
            yield {name: tensor.to(device) for name, tensor in batch.items()}


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
