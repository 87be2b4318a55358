"""Documents kept apart in a sequence are each alone: to rounding in float64, in training and in evaluation."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from foldrank.core.config import LowRankConfig, ResidualConfig
from foldrank.data.config import SequenceFormat
from foldrank.data.sequences import IGNORED, PackedBlocks, kept_apart, sequences_of
from foldrank.hf import LowRankLlamaConfig, LowRankLlamaForCausalLM, convert_
from foldrank.recipes import load_recipe
from foldrank.train.chunked_loss import chunk_loss_
from foldrank.train.evaluate import evaluate_loss
from foldrank.train.pretrain import pretrain

END = 0
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LOW_RANK = LowRankConfig(rank=5, activation="silu", residual=ResidualConfig(alpha=1.0))


def crnet() -> PreTrainedModel:
    low_rank = LowRankConfig(rank=5, backbone="crnet", dense_first=1)
    return LowRankLlamaForCausalLM(LowRankLlamaConfig(**SHAPE, low_rank=low_rank.to_dict()))


def low_rank_gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=1,
        **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0),
    )
    model = GPT2LMHeadModel(config)
    convert_(model, LOW_RANK)
    return model


MODELS = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "low-rank Llama": lambda: LowRankLlamaForCausalLM(LowRankLlamaConfig(**SHAPE, low_rank=LOW_RANK.to_dict())),
    "CR-Net": crnet,
    "Qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=6)),
    "Mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE)),
    "low-rank GPT-2": low_rank_gpt2,
}


def losses_of(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """The cross-entropy of each predicted token, in the model's dtype."""
    labels = inputs.pop("labels")
    logits = model(**inputs, use_cache=False).logits
    flat = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat[labels[:, 1:].flatten() != IGNORED]


@pytest.mark.parametrize("ends", [(4, 5, 13), (), (0, 22), (0, 1, 2), (21,)], ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_each_document_is_as_if_it_were_alone(family: str, ends: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = MODELS[family]().double()
    ids = torch.randint(1, 64, (23,))
    ids[list(ends)] = END
    item = kept_apart({"input_ids": ids, "labels": ids}, END)
    together = losses_of(model, **{name: tensor[None] for name, tensor in item.items()})
    together.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    bounds = sorted({0, *(end + 1 for end in ends), 23})
    documents = [ids[None, start:stop] for start, stop in pairwise(bounds)]
    alone = [losses_of(model, input_ids=one, labels=one) for one in documents if one.shape[1] > 1]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-13)
    torch.cat(alone).sum().backward()
    for one, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunked", [False, True])
def test_an_evaluation_keeps_them_apart_too(chunked: bool) -> None:
    torch.manual_seed(1)
    model = MODELS["low-rank Llama"]()
    if chunked:
        chunk_loss_(model)
    tokens = torch.randint(1, 64, (4 * 23,)).numpy()
    tokens[[3, 9, 22, 30, 50, 80, 91]] = END
    # Of one length, so that each block's documents are also sequences of a dataset of their own.
    blocks = PackedBlocks([tokens], 23, END)
    documents = [part for block in tokens.reshape(4, 23) for part in np.split(block, np.flatnonzero(block == END) + 1)]
    alone = [evaluate_loss(model, PackedBlocks([part], len(part))) for part in documents if len(part) > 1]
    together = evaluate_loss(model, blocks, batch_size=3)
    assert together.tokens == sum(one.tokens for one in alone)
    assert together.loss == pytest.approx(sum(one.loss * one.tokens for one in alone) / together.tokens, abs=2e-7)
    assert evaluate_loss(model, PackedBlocks([tokens], 23)).loss != pytest.approx(together.loss, abs=1e-3)


@pytest.mark.parametrize("length", [1, 2, 7, 24, 1000])
def test_best_fit_keeps_every_token_once_and_fills_as_full_as_by_hand(length: int) -> None:
    draw = np.random.default_rng(length)
    lengths = draw.integers(1, 40, size=60)
    shards, offsets, token = [], [], 1
    for part in np.split(lengths, [20, 21]):
        documents = []
        for size in part:
            documents.append(np.append(np.arange(token, token + size - 1), END))
            token += size - 1
        shards.append(np.concatenate(documents).astype("<u4"))
        offsets.append(np.cumsum(part).astype("<u4"))
    form = SequenceFormat(length=length, layout="best-fit", document_mask=True)
    packed = sequences_of(shards, offsets, form, end_token=END, pad_token=7)
    items = [packed[index] for index in range(len(packed))]
    assert packed.num_tokens(np.arange(len(packed))) == lengths.sum()
    seen, fills = [], []
    for number, item in enumerate(items):
        filled = packed.num_tokens(np.array([number]))
        assert item["input_ids"][filled:].tolist() == [7] * (length - filled)
        assert item["labels"][filled:].tolist() == [IGNORED] * (length - filled)
        seen += item["input_ids"][:filled].tolist()
        fills.append(filled)
    assert sorted(seen) == sorted(np.concatenate(shards).tolist())
    # By hand: the longest first, each into the fullest sequence that still takes it.
    pieces = [min(length, size - at) for size in lengths for at in range(0, size, length)]
    expected: list[int] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [number for number, fill in enumerate(expected) if fill + piece <= length]
        if fitting:
            expected[max(fitting, key=lambda number: expected[number])] += piece
        else:
            expected.append(piece)
    assert sorted(fills) == sorted(expected)


def test_a_run_of_whole_documents_kept_apart(recipe_file: Path, tmp_path: Path) -> None:
    settings = {"train.layout": "best-fit", "train.document_mask": True, "train.steps": 2, "train.chunked_loss": True}
    run = pretrain(load_recipe(str(recipe_file), settings), tmp_path / "run", quiet=True)
    assert run.history[-1].val_loss == pytest.approx(run.val_loss_folded, abs=1e-5)
    assert run.fold_max_abs_logit_drift < 1e-5


def test_one_document_a_sequence_has_nothing_to_keep_apart() -> None:
    with pytest.raises(ValueError, match="document_mask has nothing to keep apart"):
        load_recipe("demo", {"train.layout": "padded", "train.document_mask": True})
