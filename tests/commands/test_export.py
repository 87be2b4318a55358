"""`foldrank export`: a low-rank checkpoint as a plain dense one of its family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, LlamaForCausalLM

from foldrank import LowRankConfig, fold_
from foldrank.core.config import ResidualConfig
from foldrank.hf import (
    LowRankGPT2Config,
    LowRankGPT2ForCausalLM,
    LowRankLlamaConfig,
    LowRankLlamaForCausalLM,
    LowRankQwen3Config,
    LowRankQwen3ForCausalLM,
)
from foldrank.hf.checkpoint import inspect
from foldrank.hf.dense import to_dense
from foldrank.hf.families import LOW_RANK_CLASSES
from foldrank.train.run_folder import save

from ..called import Foldrank
from ..small_runs import Run

LLAMA: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LowRankLlamaConfig, LowRankLlamaForCausalLM, {**LLAMA, "attention_bias": True}),
    "tied": (LowRankLlamaConfig, LowRankLlamaForCausalLM, {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": (LowRankQwen3Config, LowRankQwen3ForCausalLM, {**LLAMA, "head_dim": 24, "num_key_value_heads": 1}),
    "gpt2": (LowRankGPT2Config, LowRankGPT2ForCausalLM, {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 2}),
}
PLAIN = LowRankConfig(rank=7)
SLTRAIN = LowRankConfig(rank=7, backbone="sltrain", extra_config={"density": 0.1}, scale=0.5)


def model_of(case: str, low_rank: LowRankConfig) -> Any:
    torch.manual_seed(0)
    config, model, fields = CASES[case]
    made = model(config(**fields, low_rank=low_rank)).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    fold_(made)
    return made


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("low_rank", [PLAIN, SLTRAIN], ids=["lowrank", "sltrain"])
def test_the_dense_model_computes_the_same(case: str, low_rank: LowRankConfig):
    model, ids = model_of(case, low_rank).double(), torch.arange(40).view(2, 20)
    dense = to_dense(model)
    assert type(dense) is next(plain for plain, low in LOW_RANK_CLASSES.items() if low is type(model))
    torch.testing.assert_close(dense(ids).logits, model(ids).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("case", "plain"), [("llama", LlamaForCausalLM), ("gpt2", GPT2LMHeadModel)])
def test_what_is_written_needs_no_foldrank(
    case: str, plain: Any, finished_run: Run, tmp_path: Path, foldrank: Foldrank
):
    tokenizer = AutoTokenizer.from_pretrained(finished_run.out / "folded")
    model = model_of(case, PLAIN)
    save(model, tokenizer, tmp_path / "folded")
    result = foldrank("export", tmp_path / "folded", "--out", tmp_path / "dense", "--json").json
    assert result["largest_change_of_a_logit"] < 1e-4
    assert inspect(tmp_path / "dense").state == "dense"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(loaded) is plain
    ids = torch.arange(40).view(2, 20)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert loaded.num_parameters() == result["parameters"] > result["parameters_low_rank"] == model.num_parameters()
    assert "plain" in foldrank("export", tmp_path / "folded", "--out", tmp_path / "again").stdout


def test_what_no_dense_matrix_does_is_one_line(finished_run: Run, tmp_path: Path, foldrank: Foldrank):
    for part, says in (
        ("folded", "computes B silu(A x), which no dense matrix does"),
        ("unfolded", "is unfolded: export takes a folded checkpoint"),
        ("checkpoints", "is no checkpoint"),
    ):
        called = foldrank("export", finished_run.out / part, "--out", tmp_path / "dense")
        assert (called.code, called.stderr.count("\n")) == (2, 1)
        assert says in called.stderr
        assert not (tmp_path / "dense").exists()
    called = foldrank("export", finished_run.out / "folded", "--out", finished_run.out)
    assert "exists: choose another folder" in called.stderr


def test_an_unfolded_and_a_dense_model_are_refused():
    def llama(low_rank: Any) -> Any:
        return LowRankLlamaForCausalLM(LowRankLlamaConfig(**LLAMA, low_rank=low_rank))

    with pytest.raises(ValueError, match="is not folded: fold the model first"):
        to_dense(llama(LowRankConfig(rank=7, residual=ResidualConfig())))
    with pytest.raises(ValueError, match="the model is dense already"):
        to_dense(llama(None))
    with pytest.raises(ValueError, match="adds what the block before gave"):
        to_dense(llama(LowRankConfig(rank=7, backbone="crnet", dense_first=1)))
