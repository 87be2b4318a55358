"""Families beside Llama, by their configs: what they cost, and runs from the first step to the folded checkpoint."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from foldrank.core.config import LowRankConfig, ResidualConfig
from foldrank.core.inventory import count_parameters
from foldrank.recipes import Recipe, load_recipe
from foldrank.recipes.model_config import ModelConfig
from foldrank.train.accounting import memory, parameters, training_flops
from foldrank.train.model import build_model, meta_model
from foldrank.train.pretrain import pretrain

from .test_accounting import (
    TRAIN,
    Alive,
    Way,
    batch_of,
    flop_counter,
    kept_for_backward,
    loss_of,
    real_model,
    with_way,
)

SHARED = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", **SHARED, "num_key_value_heads": 4, "sliding_window": None},
    "qwen3": {"model_type": "qwen3", **SHARED, "num_key_value_heads": 4, "head_dim": 24},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
    | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
}
LOW_RANK = {
    "dense": None,
    "lowrank": LowRankConfig(rank=16),
    "cola-dlr": LowRankConfig(rank=16, activation="silu", residual=ResidualConfig()),
}
EACH = pytest.mark.parametrize("family", CONFIGS)


def recipe_of(family: str, method: str, dtype: str = "float32") -> Recipe:
    return Recipe(
        model=ModelConfig(config=CONFIGS[family], vocab_size=512),
        low_rank=LOW_RANK[method],
        train=replace(TRAIN, dtype=dtype),
    )


@EACH
@pytest.mark.parametrize("method", LOW_RANK)
def test_parameters_and_flops_are_those_that_are_there(family: str, method: str):
    recipe = recipe_of(family, method)
    model = real_model(recipe, attention="eager")  # the counter does not know the flash kernel of the CPU
    assert parameters(model).total == count_parameters(meta_model(recipe))
    with flop_counter() as counter:
        loss_of(model, batch_of(recipe), recipe).backward()
    assert training_flops(recipe).total * 8 * 32 == counter.get_total_flops()


@EACH
@pytest.mark.parametrize("method", ["dense", "cola-dlr"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [None, "block"], ids=str)
def test_memory_is_what_a_pass_takes(family: str, method: str, dtype: str, checkpointing: Way):
    recipe = recipe_of(family, method, dtype)
    model = real_model(recipe, checkpointing=checkpointing)
    used = memory(with_way(recipe, checkpointing))
    if checkpointing is None:
        kept = used.blocks + used.head_and_loss + used.weight_copies
        assert kept == pytest.approx(kept_for_backward(model, recipe), rel=0.015)
    ids = batch_of(recipe)
    loss_of(model, ids, recipe).backward()
    with Alive([*model.parameters(), *(each.grad for each in model.parameters()), *model.buffers(), ids]) as real:
        loss_of(model, ids, recipe).backward()
    planned = used.total - used.weights - used.gradients - used.optimizer
    assert 0.98 * real.peak < planned < (1.3 if checkpointing else 1.05) * real.peak


@pytest.fixture(scope="module", params=CONFIGS)
def run(request: pytest.FixtureRequest, recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A recipe of the family, with dropout where it has some, and the folder of its run of eight steps."""
    config = CONFIGS[request.param] | ({"resid_pdrop": 0.2, "attn_pdrop": 0.2} if request.param == "gpt2" else {})
    settings = {"model.config": config, "train.steps": 8, "train.save_every": 4, "train.optimizer": "muon"}
    recipe = load_recipe(str(recipe_file), settings)
    out = tmp_path_factory.mktemp(request.param) / "run"
    return recipe, out, pretrain(recipe, out, quiet=True)


def test_a_run_folds_and_loads_by_the_auto_classes(run: Any):
    recipe, out, metrics = run
    assert metrics.fold_max_abs_logit_drift < 1e-4
    assert metrics.val_loss_folded == pytest.approx(metrics.val_loss, abs=1e-5)
    assert metrics.history[-1].train_loss < metrics.history[0].train_loss
    model = AutoModelForCausalLM.from_pretrained(out / "folded")
    assert model.config.model_type == f"lowrank_{recipe.model.config['model_type']}"
    ids = AutoTokenizer.from_pretrained(out / "folded")("bar", return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(model(**ids).logits).all()


def test_a_run_goes_on_to_the_last_bit(run: Any, tmp_path: Path):
    recipe, out, _ = run
    shutil.copytree(out, tmp_path / "cut")
    for late in ("metrics.json", "folded", "unfolded", "checkpoints/checkpoint-8"):
        path = tmp_path / "cut" / late
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    pretrain(recipe, tmp_path / "cut", resume=True, quiet=True)
    ours, theirs = (load_file(each / "unfolded" / "model.safetensors") for each in (tmp_path / "cut", out))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@EACH
def test_latents_alone_may_be_kept(family: str):
    recipe = recipe_of(family, "cola-dlr")
    gradients = []
    for way in (None, "latents"):
        model: Any = build_model(with_way(recipe, way), 512)
        model.set_attn_implementation("eager")
        loss_of(model.train(), torch.arange(256).view(8, 32), recipe).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
