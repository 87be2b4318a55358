"""Surgery, training and the fold on architectures that others wrote, tiny and with random weights."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from foldrank import LowRankConfig, ResidualConfig, factorize_, fold_
from foldrank.tree import low_rank_layers

from .models import TOKENS, relative_rms


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16))


def test_conv1d_of_gpt2_is_converted_in_its_own_orientation() -> None:
    model = gpt2().eval()
    report = factorize_(model, LowRankConfig(rank=4, activation="silu", residual=ResidualConfig()))
    shapes = {layer.name: (layer.in_features, layer.out_features) for layer in report.converted}
    assert shapes == {
        f"transformer.h.{block}.{name}": shape
        for block in (0, 1)
        for name, shape in (
            ("attn.c_attn", (16, 48)),
            ("attn.c_proj", (16, 16)),
            ("mlp.c_fc", (16, 64)),
            ("mlp.c_proj", (64, 16)),
        )
    }
    assert dict(report.skipped) == {"lm_head": "its weight is shared with transformer.wte"}
    assert all(layer.up.bias is not None for layer in low_rank_layers(model).values())
    expected = model(TOKENS).logits
    fold_(model)
    assert relative_rms(model(TOKENS).logits, expected) <= 1e-6
    assert isinstance(expected, torch.Tensor)
