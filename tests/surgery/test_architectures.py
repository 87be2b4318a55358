"""Surgery, a training step and the fold on architectures that others wrote, tiny and with random weights."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from foldrank import LowRankConfig, ResidualConfig, factorize_, fold_
from foldrank.core.inventory import low_rank_layers
from foldrank.core.residual import DuplicatedLatentResidual

from ..core.models import TOKENS, assert_unchanged, relative_rms, snapshot, train

COLA = LowRankConfig(rank=4, activation="silu", residual=ResidualConfig())
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
GATED = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PIXELS = torch.linspace(-1, 1, 3 * 3 * 8 * 8).reshape(3, 3, 8, 8)
LLAMA: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VIT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 5,
}


class Logits(nn.Module):
    """A transformers model that gives its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.inner(*inputs).logits


class PlainBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.feed_forward(self.norms[1](x))


class PlainTransformer(nn.Module):
    """Nobody's architecture: fused attention weights, positions as a bare parameter, a tied head."""

    def __init__(self, width: int = 16, vocabulary: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.pos_embed = nn.Parameter(torch.zeros(8, width))
        self.blocks = nn.ModuleList(PlainBlock(width) for _ in range(2))
        self.to_logits = nn.Linear(width, vocabulary, bias=False)
        self.to_logits.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.to_logits(x)


@dataclass
class Architecture:
    build: Callable[[], nn.Module]
    blocks: str
    """Format of a block's name."""
    converted: tuple[str, ...]
    """Names in each of the two blocks."""
    skipped: dict[str, str] = field(default_factory=dict)
    inputs: Tensor = TOKENS


def experts(hidden: int, count: int = 4, width: int = 24) -> dict[str, str]:
    why = "outside of any nn.Linear, which surgery does not reach"
    return {
        f"inner.model.layers.{block}.mlp.{name}": f"{what} {why}"
        for block in (0, 1)
        for name, what in (
            ("experts.gate_up_proj", f"{count} weights fused in one parameter ({count}, {2 * width}, {hidden})"),
            ("experts.down_proj", f"{count} weights fused in one parameter ({count}, {hidden}, {width})"),
            ("gate.weight", f"a parameter ({count}, {hidden})"),
        )
    }


HEAD = {"inner.lm_head": "output head (after the last block of inner.model.layers)"}
TIED = {"inner.lm_head": "its weight is shared with inner.model.embed_tokens"}
MIXTURE: dict[str, Any] = {"num_experts_per_tok": 2, **LLAMA}
ARCHITECTURES = {
    "llama": Architecture(lambda: Logits(LlamaForCausalLM(LlamaConfig(**LLAMA))), "inner.model.layers.{}", GATED, HEAD),
    "mistral": Architecture(
        lambda: Logits(MistralForCausalLM(MistralConfig(**LLAMA))), "inner.model.layers.{}", GATED, HEAD
    ),
    "qwen3": Architecture(lambda: Logits(Qwen3ForCausalLM(Qwen3Config(**LLAMA))), "inner.model.layers.{}", GATED, HEAD),
    "gemma": Architecture(lambda: Logits(GemmaForCausalLM(GemmaConfig(**LLAMA))), "inner.model.layers.{}", GATED, TIED),
    "mixtral": Architecture(
        lambda: Logits(MixtralForCausalLM(MixtralConfig(num_local_experts=4, **MIXTURE))),
        "inner.model.layers.{}",
        ATTENTION,
        HEAD | experts(16),
    ),
    "qwen3-moe": Architecture(
        lambda: Logits(Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=4, moe_intermediate_size=24, **MIXTURE))),
        "inner.model.layers.{}",
        ATTENTION,
        HEAD | experts(16),
    ),
    "gpt2": Architecture(
        lambda: Logits(GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16))),
        "inner.transformer.h.{}",
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        {"inner.lm_head": "its weight is shared with inner.transformer.wte"},
    ),
    "vit": Architecture(
        lambda: Logits(ViTForImageClassification(ViTConfig(**VIT))),
        "inner.vit.layers.{}",
        (*(f"attention.{name}_proj" for name in "qkvo"), "mlp.fc1", "mlp.fc2"),
        {"inner.classifier": "output head (after the last block of inner.vit.layers)"},
        PIXELS,
    ),
    "plain": Architecture(
        PlainTransformer,
        "blocks.{}",
        ("qkv", "out", "feed_forward.0", "feed_forward.2"),
        {"to_logits": "its weight is shared with tokens"},
    ),
}
EACH = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)


@EACH
def test_converts_trains_and_folds(architecture: Architecture) -> None:
    torch.manual_seed(0)
    model = architecture.build()
    report = factorize_(model, COLA)
    names = [f"{architecture.blocks.format(block)}.{name}" for block in (0, 1) for name in architecture.converted]
    assert sorted(layer.name for layer in report.converted) == sorted(names)
    assert dict(report.skipped) == architecture.skipped
    lines = str(report).splitlines()
    for name, reason in report.skipped.items():
        assert any(line.startswith(name) and line.endswith(reason) for line in lines)
    train(model, architecture.inputs)
    model.eval()
    with torch.no_grad():
        expected = model(architecture.inputs)
        assert len(fold_(model).errors) == len(names)
        assert relative_rms(model(architecture.inputs), expected) <= 1e-6
    assert not any(isinstance(module, DuplicatedLatentResidual) for module in model.modules())


@EACH
def test_refusals_leave_the_model_as_it_was(architecture: Architecture) -> None:
    model = architecture.build()
    before = snapshot(model)
    for config, complaint in (
        (LowRankConfig(rank=4, targets=["w_q"]), "targets: 'w_q' matches no linear layer here; the nearest names are"),
        (LowRankConfig(rank=100), "rank 100 is above the full rank"),
        (LowRankConfig(budget=0.001), "remain at rank 1"),
    ):
        with pytest.raises(ValueError, match=complaint):
            factorize_(model, config)
        assert_unchanged(model, before)
    factorize_(model, COLA)
    before = snapshot(model)
    with pytest.raises(ValueError, match="the model is already low-rank"):
        factorize_(model, COLA)
    assert_unchanged(model, before)


@EACH
def test_on_the_meta_device_nothing_is_allocated(architecture: Architecture) -> None:
    with torch.device("meta"):
        model = architecture.build()
    factorize_(model, COLA)
    assert low_rank_layers(model)
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_conv1d_is_read_in_its_own_orientation() -> None:
    report = factorize_(ARCHITECTURES["gpt2"].build(), COLA)
    shapes = {layer.name.rpartition("h.0.")[2]: (layer.in_features, layer.out_features) for layer in report.converted}
    assert shapes["attn.c_attn"] == (16, 48)
    assert shapes["mlp.c_fc"] == (16, 64)
    assert shapes["mlp.c_proj"] == (64, 16)


def test_a_pattern_for_fused_experts_is_told_why_not() -> None:
    model = ARCHITECTURES["mixtral"].build()
    with pytest.raises(ValueError, match=r"'gate_up_proj' matches no linear layer here, only .*: 4 weights fused"):
        factorize_(model, LowRankConfig(rank=4, targets=["q_proj", "gate_up_proj"]))


def encoder(batch_first: bool) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_encoder_of_torch_works_in_eval_mode(batch_first: bool, padded: bool) -> None:
    model = encoder(batch_first)
    report = factorize_(model, COLA)
    assert [layer.name for layer in report.converted] == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert {name.rpartition("self_attn.")[2] for name in report.skipped} == {"in_proj_weight", "out_proj"}
    reasons = [report.skipped[f"layers.0.self_attn.{name}"] for name in ("in_proj_weight", "out_proj")]
    assert reasons[0].startswith("a parameter (48, 16) outside of any nn.Linear")
    assert reasons[1].startswith("a NonDynamicallyQuantizableLinear, whose owner may use its weight")
    x = torch.randn(3, 5, 16)
    mask = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [4], [2]]) if padded else None
    if not batch_first:
        x = x.transpose(0, 1)
    train(model, x)
    trained = model(x, src_key_padding_mask=mask)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=mask), trained)
        fold_(model)
        torch.testing.assert_close(model(x, src_key_padding_mask=mask), trained)


def test_an_encoder_that_was_not_converted_keeps_its_fast_path() -> None:
    model = nn.ModuleDict({"encoder": encoder(batch_first=True), "adapter": nn.Linear(16, 16)})
    factorize_(model, LowRankConfig(rank=4, targets=["adapter"]))
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    assert [module.use_nested_tensor for module in encoders] == [True]
    layers = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    assert [layer.activation_relu_or_gelu for layer in layers] == [1, 1]
