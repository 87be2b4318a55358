"""Folded and unfolded checkpoints come back through the Auto classes, to the last bit."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from foldrank import LowRankConfig, ResidualConfig, fold_
from foldrank.core.inventory import low_rank_layers
from foldrank.hf import LowRankLlamaForCausalLM, LowRankLlamaModel
from foldrank.surgery.factorize import describe

from .models import COLA_DLR, hidden, logits, trained

RESIDUALS = {
    "contiguous": ResidualConfig(),
    "balanced": ResidualConfig(alpha=0.6, expansion="balanced"),
    "random": ResidualConfig(expansion="random", seed=5),
    "alternating": ResidualConfig(alpha=0.8, signs="alternating"),
    "random signs": ResidualConfig(expansion="random", signs="random", seed=5),
    "trainable": ResidualConfig(alpha=0.7, trainable=True),
    "uncorrected": ResidualConfig(alpha=0.2, variance_correction=False),
    "attention": ResidualConfig(scope="attention"),
    "by pattern": ResidualConfig(alpha={"mlp.up_proj": 0.4, "layers.1.self_attn.q_proj": 1.5}),
}


def assert_reloads(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    causal = AutoModelForCausalLM.from_pretrained(folder)
    assert type(causal) is LowRankLlamaForCausalLM
    assert causal.dtype == model.dtype
    assert causal.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(causal), logits(model))
    base = AutoModel.from_pretrained(folder)
    assert type(base) is LowRankLlamaModel
    assert torch.equal(hidden(base), hidden(model.model))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("fold", [False, True], ids=["unfolded", "folded"])
def test_logits_are_equal_to_the_last_bit(fold: bool, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained(dtype=dtype, tie_word_embeddings=tied)
    if fold:
        fold_(model)
    assert_reloads(model, tmp_path)
    head, embedding = (model.get_output_embeddings(), model.get_input_embeddings())
    assert isinstance(head, nn.Linear)
    assert isinstance(embedding, nn.Embedding)
    assert (head.weight is embedding.weight) is tied


@pytest.mark.parametrize("fold", [False, True], ids=["unfolded", "folded"])
@pytest.mark.parametrize("residual", RESIDUALS.values(), ids=RESIDUALS)
def test_each_residual_reloads(residual: ResidualConfig, fold: bool, tmp_path: Path) -> None:
    model = trained(LowRankConfig(rank=3, residual=residual))
    if fold:
        fold_(model)
    assert_reloads(model, tmp_path)


@pytest.mark.parametrize(
    "low_rank",
    [
        None,
        LowRankConfig(rank=0.25),
        LowRankConfig(rank={"mlp.up_proj": 5, r".*layers\.0\..*": 2}, activation="gelu"),
        LowRankConfig(rank=4, exclude=["layers.1.mlp.down_proj"], residual=ResidualConfig()),
    ],
    ids=["dense", "fraction", "table", "excluded"],
)
@pytest.mark.parametrize("biases", [False, True], ids=["no bias", "bias"])
def test_each_backbone_reloads(low_rank: LowRankConfig | None, biases: bool, tmp_path: Path) -> None:
    assert_reloads(trained(low_rank, attention_bias=biases, mlp_bias=biases), tmp_path)


@pytest.mark.parametrize("fold", [False, True], ids=["unfolded", "folded"])
def test_the_config_says_what_the_model_is(fold: bool, tmp_path: Path) -> None:
    model = trained()
    if fold:
        fold_(model)
    model.save_pretrained(tmp_path)
    low_rank = AutoConfig.from_pretrained(tmp_path).low_rank
    assert set(low_rank["rank"].values()) == {3}
    assert low_rank["activation"] == "silu"
    assert (low_rank["residual"] is None) is fold
    assert describe(AutoModelForCausalLM.from_pretrained(tmp_path)) == describe(model)


def test_no_name_of_a_folded_checkpoint_speaks_of_a_residual(tmp_path: Path) -> None:
    model = trained(LowRankConfig(rank=3, residual=ResidualConfig(trainable=True, expansion="random")))
    assert any("residual" in name for name, _ in model.named_parameters())
    assert any("residual" in name for name, _ in model.named_buffers())
    fold_(model)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for names in (reloaded.named_modules(), reloaded.named_parameters(), reloaded.named_buffers()):
        assert not [name for name, _ in names if "residual" in name]
    assert all(layer.residual is None for layer in low_rank_layers(reloaded).values())


def test_an_unfolded_checkpoint_trains_on_and_folds(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "unfolded")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "unfolded")
    expected = logits(reloaded)
    fold_(reloaded)
    torch.testing.assert_close(logits(reloaded), expected)
    reloaded.save_pretrained(tmp_path / "folded")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "folded")), logits(reloaded))


def test_weights_can_be_cast_while_they_are_loaded(tmp_path: Path) -> None:
    model = trained(LowRankConfig(rank=3, residual=ResidualConfig(alpha=0.7, trainable=True, expansion="random")))
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in reloaded.parameters()} == {torch.bfloat16}
    expected = logits(model)
    error = (logits(reloaded).float() - expected).norm() / expected.norm()
    assert 0 < error < 0.03


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("fold", [False, True], ids=["unfolded", "folded"])
def test_generation_with_and_without_cache(fold: bool, cached: bool) -> None:
    model = trained()
    if fold:
        fold_(model)
    prompt = torch.tensor([[5, 9, 14]])
    greedy = prompt
    with torch.no_grad():
        for _ in range(8):
            greedy = torch.cat([greedy, model(input_ids=greedy).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    generated = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=prompt, max_new_tokens=8, do_sample=False, use_cache=cached, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(generated, greedy)


def test_the_method_is_in_the_checkpoint_alone(tmp_path: Path) -> None:
    """Nothing that the process remembers is needed: the folder read twice gives two equal models."""
    trained(COLA_DLR).save_pretrained(tmp_path)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
