"""What training a recipe's model costs: parameters, FLOPs and bytes, from shapes alone; nothing is allocated.

Letters: N weights of the matrices that multiply (the head is one, the embedding a look-up; of a low-rank layer its two
factors), L blocks, d width, f width of the MLP, H heads, r rank, V vocabulary, T tokens per sequence, n tokens per
forward pass and GPU, w bytes of a number in a matrix product (4 in float32, 2 in bfloat16).

FLOPs per token (a multiplication and an addition are 2)
    6 N + 12 L d T     forward and backward (PaLM, appendix B, arXiv 2204.02311, with d = H Q; nothing is taken off for
                       the causal mask, as there)
    + 2 N + 4 L d T    of the blocks, where activation checkpointing computes them again (arXiv 2104.04473); less the
                       last matrix of each block: PyTorch stops before the product, which the backward pass does not
                       need (SLTrain's, behind it); where the latents are kept, less the down-projections too (CoLA-M,
                       arXiv 2502.10940)
    SLTrain's layers multiply by one matrix of d_in d_out weights. Making it in both passes and the gradients of its
    factors are 8 r d_in d_out / n, and 2 r d_in d_out / n where activation checkpointing makes it again.
    The residual, one addition per output feature and pass, is not counted.

Bytes: weights, gradients and AdamW's two averages are float32, 4 + 4 + 8 per parameter (arXiv 1910.02054, section 3.1).
The indices of SLTrain's values are counted with the weights, 4 per value and per output; FSDP does not shard them.
Activations are what autograd keeps of transformers' Llama, with a flash kernel for attention and no mask, found by
listing the saved tensors (the method of arXiv 2205.05198, section 4). Of each token a block keeps
    2 (2 d + 1) 4      of its norms, in float32: input, normalized input, reciprocal root
    5 d w              inputs of q, k, v, gate, up, cast for each in bfloat16; 2 d w in float32, where they are shared
    4 d w + 4 H        q, k, v, output of attention; its log-sum-exp. With heads of another width, or fewer for k and v,
                       as wide as these are
    4 f w              gate, SiLU(gate), up, their product
    r w                the latent of each low-rank layer; twice where the activation needs its input again (SiLU, GELU)
    4 d w              on CR-Net's backbone, from the second block on: q, k, output and MLP of the block before
    T w                where documents are kept apart, the mask: on a GPU FlexAttention keeps less
of Qwen3 also (4 + w) for each number of q and k and 4 for each of their heads, which its two further norms keep; and of
GPT-2 in place of the first, second and fourth row
    2 (4 d + 8)        of its norms: input, mean, reciprocal deviation
    2 d w              inputs of attention and MLP
    5 f w              around GELU, which transformers computes in steps; and 2 d, where it trains with dropout
with activation checkpointing
    4 d                its input, in float32
    r w                where the latents are kept, A x of each low-rank layer
    (5 d + 2 f) w      on CR-Net's backbone, from the second block on: what all projections of the block before gave
and the model (2 d + 1) 4 + d w for the last norm (of GPT-2 4 d + 8 + d w) and the head, and 4 V for the
log-probabilities. In bfloat16 it also keeps copies of the weights. Where a layer has a residual or a scale, its
effective weight is a copy of the up-projection, kept until the backward pass, in bfloat16 in place of the cast one.
With `train.chunked_loss` the gradient of the head's weight, 4 V d in all, takes the place of the log-probabilities, and
the head's weight is not kept as a copy; the FLOPs are the same (train/chunked_loss.py).

An evaluation holds weights, the optimizer's averages and, of a micro-batch, either what one block makes, 3 (d + f) 4 a
token, or 3 V 4 for logits, their copy and log-probabilities (of a chunk of tokens with `train.chunked_loss`). The check
of the fold keeps at most `MOST_LOGITS` logits besides (train/evaluate.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from torch import nn
from transformers import PreTrainedModel

from foldrank.core.inventory import count_parameters
from foldrank.recipes.schema import Recipe
from foldrank.recipes.train_config import TrainConfig
from foldrank.train import chunked_loss
from foldrank.train.block_costs import (
    effective_weights,
    family,
    handed_on,
    kept_of_before,
    last_product,
    low_rank_in,
    numbers_in_sparse,
    numbers_of_downs,
    numbers_of_effective_ups,
    products,
    products_that_make_whole,
    saved_by_norm,
    saved_per_token,
    sparse_in,
    widths,
    with_latents_in,
)
from foldrank.train.evaluate import MOST_LOGITS
from foldrank.train.model import trained_shape
from foldrank.train.optimizer_cost import optimizer_bytes
from foldrank.train.sharding import parts_in
from foldrank.train.stand_ins import blocks_of, stands_for, times_of, total

PARTS = {
    "norms": ("norm.", "q_norm.", "k_norm.", "input_layernorm.", "post_attention_layernorm.", "ln_"),
    "embedding": ("embed_tokens.", "wte.", "wpe."),
    "attention": ("self_attn.", "attn."),
    "mlp": ("mlp.",),
    "head": ("lm_head.",),
}
"""From the parts of a model to how the names of modules in them begin; the first that fits."""

FOLD_CHECK_SEQUENCES = 32
"""Validation sequences on which the fold is verified."""


class _Parts:
    """Parts that sum to a total."""

    __slots__ = ()

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The parts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters(_Parts):
    """Numbers that are trained. A head tied to the embedding has none of its own."""

    embedding: int
    attention: int
    mlp: int
    norms: int
    head: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Flops(_Parts):
    """FLOPs per token, forward and backward."""

    matrices: int
    attention: int
    recomputed: int
    """0 without activation checkpointing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory(_Parts):
    """Bytes on one GPU at the peak of a step: an upper bound, as the parts do not all peak at one moment.

    Not counted: the allocator's fragmentation, the CUDA context, token ids, buffers (each small, or not ours).
    """

    weights: int
    gradients: int
    optimizer: int
    """What the optimizer keeps (train/optimizer_cost.py)."""
    communication: int
    """DDP: buckets as large as the gradients. FSDP: what is gathered at one moment, see `memory`."""
    weight_copies: int
    """Weights cast to bfloat16, and effective weights."""
    blocks: int
    """What the blocks keep for the backward pass; with activation checkpointing their inputs, or these and latents."""
    head_and_loss: int
    """What the last norm, the head and the loss keep."""
    transient: int
    """The gradient of the logits, twice, in float32; with activation checkpointing, at least what one block takes. With
    `train.chunked_loss` the most that one moment takes: a chunk's logits, the head's gradients, or those of an MLP."""


def parameters(model: PreTrainedModel) -> Parameters:
    """The parameters of a Llama by part."""
    counts = dict.fromkeys((field.name for field in fields(Parameters)), 0)
    times = times_of(model)
    for name, parameter in model.named_parameters():
        counts[_part(name)] += parameter.numel() * times.get(id(parameter), 1)
    return Parameters(**counts)


def factors(model: PreTrainedModel) -> dict[str, int]:
    """Of the parameters, those of low-rank layers: of `down`, `up`, and a trainable `residual`."""
    counts: dict[str, int] = {}
    times = times_of(model)
    for layer in low_rank_in(model):
        for name, parameter in layer.named_parameters():
            kind = name.partition(".")[0]
            counts[kind] = counts.get(kind, 0) + parameter.numel() * times.get(id(parameter), 1)
    return counts


def flops_per_token(model: PreTrainedModel, train: TrainConfig, *, tokens_per_pass: int | None = None) -> Flops:
    """FLOPs that one token costs in training a Llama (top of this file).

    Args:
        model: the model, on any device.
        train: its training settings.
        tokens_per_pass: n, among which what is done once per pass is shared out; None: so many that it does not count.
    """
    blocks, checkpointing = blocks_of(model), train.activation_checkpointing
    scores = sum(map(stands_for, blocks)) * widths(model.config).q * train.sequence_length
    recomputed = sum(stands_for(block) * (products(block) - last_product(block)) for block in blocks)
    if checkpointing == "latents":
        recomputed -= sum(stands_for(block) * numbers_of_downs(block) for block in blocks)
    sums = total(model, products_that_make_whole)
    per_pass = 0 if tokens_per_pass is None else sums // tokens_per_pass
    return Flops(
        matrices=6 * total(model, products) + 8 * per_pass,
        attention=12 * scores,
        recomputed=2 * (recomputed + per_pass) + 4 * scores if checkpointing else 0,
    )


def training_flops(recipe: Recipe, *, gpus: int = 1, vocab_size: int | None = None) -> Flops:
    """FLOPs that one token costs in a run of the recipe.

    Args:
        recipe: all settings.
        gpus: processes, each with one GPU.
        vocab_size: entries of the embedding; None: as many as the recipe says.

    Raises:
        ValueError: where a step's sequences cannot be shared out among the GPUs.
    """
    tokens = recipe.train.resolve_micro_batch_size(gpus) * recipe.train.sequence_length
    return flops_per_token(trained_shape(recipe, vocab_size), recipe.train, tokens_per_pass=tokens)


def memory(recipe: Recipe, *, gpus: int = 1, vocab_size: int | None = None) -> Memory:
    """Bytes on each GPU at the peak of a step of the recipe (`model_memory`).

    Args:
        recipe: all settings.
        gpus: processes, each with one GPU.
        vocab_size: entries of the embedding; None: as many as the recipe says.

    Raises:
        ValueError: where a step's sequences cannot be shared out among the GPUs.
    """
    return model_memory(trained_shape(recipe, vocab_size), recipe.train, gpus=gpus)


def evaluation_memory(recipe: Recipe, *, gpus: int = 1, vocab_size: int | None = None) -> int:
    """Bytes on each GPU at the peak of an evaluation, and of the check of the fold: an upper bound.

    Arguments and errors are those of `memory`.
    """
    model, train = trained_shape(recipe, vocab_size), recipe.train
    shards = _shards(train, gpus)
    tokens = train.resolve_micro_batch_size(gpus) * train.sequence_length
    (d, f, *_), vocabulary = widths(model.config), model.config.vocab_size
    rows = min(chunked_loss.CHUNK, tokens) if train.chunked_loss else tokens
    logits = 4 * (3 * vocabulary * rows + 2 * d * tokens)
    saved = 4 * min(MOST_LOGITS, FOLD_CHECK_SEQUENCES * train.sequence_length * vocabulary)
    # The check of the fold holds the logits before and after, and their difference, at as many positions as allowed.
    checked = 4 * saved
    body = 4 * 3 * (d + f) * tokens
    parts = parts_in(model, train)
    state = 4 * _held(model, train, gpus) + optimizer_bytes(model, train, shards=shards, parts=parts)
    return state + body + max(logits, checked)


def model_memory(model: PreTrainedModel, train: TrainConfig, *, gpus: int = 1) -> Memory:
    """Bytes on each GPU at the peak of a step (top of this file).

    Under FSDP (`train.sharding`; arXiv 2304.11277, each block a unit) weights, gradients and optimizer state are
    divided by the GPUs. A GPU holds at one moment the gathered weights of embedding, head and two blocks (one
    prefetched), and the gradients of embedding, head and one block, all as wide as the products.

    Where layers are split (`train.tensor_parallel`; train/sharding.py) so are their weights, gradients and optimizer
    state; what blocks keep counts as if it were not, which is more than there is. Under both, parts are divided.

    Args:
        model: a Llama, on any device.
        train: its training settings.
        gpus: shares that a step's sequences come in: GPUs, or groups of them that split layers.

    Raises:
        ValueError: where a step's sequences cannot be shared out among the GPUs.
    """
    width, checkpointing = 2 if train.dtype == "bfloat16" else 4, train.activation_checkpointing
    tokens = train.resolve_micro_batch_size(gpus) * train.sequence_length
    (d, f, *_), vocabulary = widths(model.config), model.config.vocab_size
    count = total(model, count_parameters)
    blocks = blocks_of(model)
    times = [stands_for(block) for block in blocks]
    mask = width * train.sequence_length if train.document_mask else 0
    saved = [tokens * (saved_per_token(block, model.config, width) + mask) for block in blocks]
    effective = [effective_weights(block, width) for block in blocks]

    shards, parts = _shards(train, gpus), parts_in(model, train)
    communication = 0
    if shards > 1:
        units = [_of_a_part(block, parts) for block in blocks]
        unit, outside = max(units), _of_a_part(model, parts) - sum(units)
        communication = width * (2 * outside + 3 * unit)
    elif gpus > 1:
        communication = 4 * count

    # Weights that autocast copies; of a layer with a residual or a scale its effective weight is there in their place.
    copied = 0
    if width == 2 and train.sharding == "none":
        copied = total(model, products) - total(model, numbers_in_sparse) - total(model, numbers_of_effective_ups)
    head_and_loss = tokens * (saved_by_norm(model.config) + width * d)
    if train.chunked_loss:
        head_and_loss += 4 * vocabulary * d
        copied -= vocabulary * d if copied else 0
        transient = chunked_loss.transient_bytes(tokens, d, vocabulary, width)
    else:
        head_and_loss += tokens * 4 * vocabulary
        transient = 2 * 4 * vocabulary * tokens
    # Gradients of the width of an MLP, two, or three where GELU goes in steps; with checkpointing the block is computed
    # again. What the head kept is gone.
    in_a_block = (3 if family(model.config) == "gpt2" else 2) * width * f * tokens - head_and_loss
    if checkpointing:
        latents = [0] * len(blocks)
        if checkpointing == "latents":
            latents = [tokens * width * sum(layer.rank for layer in with_latents_in(block)) for block in blocks]
        # What a block gets of the one before is there as its input.
        handed = [handed_on(block, model.config) for block in blocks]
        there = [tokens * width * kept_of_before(block, model.config) for block in blocks]
        in_a_block += max(kept - latent - has for kept, latent, has in zip(saved, latents, there, strict=True))
        in_a_block += max(effective)
        saved = [tokens * (4 * d + width * n) + latent for n, latent in zip(handed, latents, strict=True)]
        effective = [0] * len(blocks)
    return Memory(
        weights=4 * _held(model, train, gpus)
        + total(model, lambda part: sum(layer.rows.nbytes + layer.columns.nbytes for layer in sparse_in(part))),
        gradients=4 * _held(model, train, gpus),
        optimizer=optimizer_bytes(model, train, shards=shards, parts=parts),
        communication=communication,
        weight_copies=2 * copied + _weighted(effective, times),
        blocks=_weighted(saved, times),
        head_and_loss=head_and_loss,
        transient=max(transient, in_a_block),
    )


def _part(name: str) -> str:
    for part, pieces in PARTS.items():
        if any(f".{piece}" in f".{name}" for piece in pieces):
            return part
    raise AssertionError(f"{name} is in no part that is known")


def _weighted(counts: list[int], times: list[int]) -> int:
    return sum(count * number for count, number in zip(counts, times, strict=True))


def _shards(train: TrainConfig, gpus: int) -> int:
    """Among how many GPUs weights, gradients and optimizer state are divided."""
    return gpus if train.sharding == "fsdp" else 1


def _held(model: PreTrainedModel, train: TrainConfig, gpus: int) -> int:
    """Parameters that one GPU holds."""
    parts = parts_in(model, train)
    return -(-total(model, lambda module: _of_a_part(module, parts)) // _shards(train, gpus))


def _of_a_part(module: nn.Module, parts: Mapping[int, Sequence[int]]) -> int:
    """Numbers of a module's parameters, of those that are split in one process."""
    return sum(math.prod(parts.get(id(parameter), parameter.shape)) for parameter in module.parameters())
