"""Starts from the meta device: the same whatever the method, the order and the device, in the memory of the model."""

import math
import multiprocessing
import resource
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from foldrank import LowRankConfig, ResidualConfig
from foldrank.core.inventory import low_rank_layers
from foldrank.hf import LowRankGPT2Config, LowRankGPT2ForCausalLM, LowRankLlamaConfig, LowRankLlamaForCausalLM
from foldrank.recipes.model_config import ModelConfig
from foldrank.recipes.schema import Recipe
from foldrank.train.model import build_model
from foldrank.train.start import start_

SMALL = Recipe(model=ModelConfig(hidden_size=64, intermediate_size=100, num_layers=3, num_heads=2))
COLA = LowRankConfig(rank=7, activation="silu")
METHODS = {
    "low rank": LowRankConfig(rank=7),
    "cola": COLA,
    "cola-dlr": LowRankConfig(rank=7, activation="silu", residual=ResidualConfig()),
    "random and trainable": LowRankConfig(rank=7, residual=ResidualConfig(trainable=True, expansion="random")),
    "scaled": LowRankConfig(rank=7, scale="trainable"),
    "sltrain": LowRankConfig(rank=7, backbone="sltrain", extra_config={"density": 0.1}),
}


def on_meta(kind: type[PreTrainedModel], config: Any) -> Any:
    with torch.device("meta"):
        return kind(config)


def start_of(low_rank: LowRankConfig | None, seed: int = 5) -> dict[str, Tensor]:
    recipe = SMALL.override({"seed": seed, "low_rank": None if low_rank is None else low_rank.to_dict()})
    return {name: tensor.detach() for name, tensor in build_model(recipe, 300).named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_whatever_two_methods_share_starts_equal(method: str) -> None:
    cola, other, dense = start_of(COLA), start_of(METHODS[method]), start_of(None)
    factors = {name for name in cola if name.endswith((".down.weight", ".up.weight"))}
    assert factors <= other.keys()
    if method != "sltrain":  # whose factors start otherwise
        assert all(torch.equal(cola[name], other[name]) for name in factors)
    assert all(torch.equal(dense[name], other[name]) for name in cola.keys() - factors)
    assert all(bool(tensor.isfinite().all()) for tensor in other.values())


def test_neither_the_threads_nor_what_was_drawn_before_matter_and_nothing_is_drawn_for_others() -> None:
    before = start_of(COLA)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        again = start_of(COLA)
        assert torch.equal(torch.rand(3), expected)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(before[name], again[name]) for name in before)
    assert not torch.equal(start_of(COLA, seed=6)["lm_head.weight"], before["lm_head.weight"])


def test_factors_of_two_layers_and_two_blocks_differ() -> None:
    start = start_of(COLA)
    ups = [
        start[f"model.layers.{block}.self_attn.{name}.up.weight"] for block in (0, 1) for name in ("q_proj", "k_proj")
    ]
    assert all(not torch.equal(one, other) for number, one in enumerate(ups) for other in ups[:number])


LlamaLike: Any = LowRankLlamaConfig
GPT2Like: Any = LowRankGPT2Config
SHAPE: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
GPT2: dict[str, Any] = {"vocab_size": 300, "n_embd": 64, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_from_the_meta_device_is_one_that_was_built(tied: bool) -> None:
    config = LlamaLike(**SHAPE, tie_word_embeddings=tied, low_rank=COLA.to_dict(), attention_bias=True)
    built, model = LowRankLlamaForCausalLM(config), on_meta(LowRankLlamaForCausalLM, config)
    filled = start_(model, seed=1)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in built.named_parameters()}
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, built.get_buffer(name))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert ("lm_head" in filled) is not tied
    ids = torch.arange(6)[None]
    fresh = LowRankLlamaForCausalLM(config)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(ids).logits, fresh(ids).logits)
    for name, layer in low_rank_layers(model).items():
        expected = 7**-0.25 * (layer.in_features + layer.out_features) ** -0.25
        assert float(layer.up.weight.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * layer.up.weight.numel()))
        assert name in filled


@torch.no_grad()
def test_architectures_start_as_transformers_starts_them() -> None:
    dense = on_meta(GPT2LMHeadModel, GPT2Config(**GPT2, n_layer=8))
    start_(dense, seed=1)
    # GPT-2 scales the projections into the residual stream, from above their modules.
    assert float(dense.transformer.h[0].attn.c_proj.weight.std()) == pytest.approx(0.02 / 4, rel=0.1)
    assert float(dense.transformer.h[0].mlp.c_fc.weight.std()) == pytest.approx(0.02, rel=0.1)
    config = GPT2Like(**GPT2, n_layer=2, low_rank=COLA.to_dict())
    low_rank = on_meta(LowRankGPT2ForCausalLM, config)
    start_(low_rank, seed=1)
    assert torch.equal(low_rank.transformer.wte.weight, dense.transformer.wte.weight)
    assert low_rank.lm_head.weight is low_rank.transformer.wte.weight
    assert bool(low_rank(torch.arange(5)[None]).logits.isfinite().all())


class WithMore(LlamaForCausalLM):
    """An architecture with a layer that starts itself, and a parameter that nobody initializes."""

    def __init__(self, config: Any, bare: bool) -> None:
        super().__init__(config)
        self.mixer = nn.Bilinear(2, 2, 3)
        if bare:
            self.temperature = nn.Parameter(torch.empty(4))


def test_what_nobody_initializes_is_named() -> None:
    with torch.device("meta"):
        good, bad = (WithMore(LlamaConfig(**SHAPE), bare=bare) for bare in (False, True))
    start_(good, seed=1)
    assert bool(good.mixer.weight.isfinite().all())
    with pytest.raises(ValueError, match=r"temperature is initialized neither by WithMore\._init_weights nor by a"):
        start_(bad, seed=1)


def _peak(recipe: Recipe, results: Any) -> None:
    build_model(SMALL, 300)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build_model(recipe, 4000)
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    results.put((used, sum(parameter.nbytes for parameter in model.parameters())))


def test_the_start_takes_the_memory_of_the_low_rank_model() -> None:
    recipe = SMALL.override(
        {"model.hidden_size": 1024, "model.intermediate_size": 2736, "model.num_layers": 12, "low_rank.rank": 256}
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["foldrank.train.pretrain"])
    results = context.Queue()
    process = context.Process(target=_peak, args=(recipe, results))
    process.start()
    used, weights = results.get(timeout=120)
    process.join()
    assert weights > 180 << 20
    assert used <= 1.1 * weights
