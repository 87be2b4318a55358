"""Blocks that are compiled once for all: the same training, whatever else is asked for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from foldrank.recipes import RECIPES
from foldrank.recipes.reading import load_recipe
from foldrank.recipes.train_config import TrainConfig
from foldrank.train.compilation import check_compiler, compile_, resolve_compile
from foldrank.train.model import build_model
from foldrank.train.pretrain import pretrain

from ..small_runs import SMALL_MODEL

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

SHORT: dict[str, Any] = {"train.steps": 4, "train.eval_every": 2, "train.save_every": 2, "model.num_layers": 3}


def losses(out: Path) -> list[float]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [entry.get("loss", entry.get("eval_loss")) for entry in entries if "loss" in entry or "eval_loss" in entry]


@pytest.mark.usefixtures("graphs_without_kernels")
def test_a_run_with_compiled_blocks_is_the_same_run_and_goes_on(recipe_file: Path, tmp_path: Path) -> None:
    plain = pretrain(load_recipe(str(recipe_file), SHORT), tmp_path / "none")
    torch.compiler.reset()
    counters.clear()
    recipe = load_recipe(str(recipe_file), {**SHORT, "train.compile": "blocks"})
    compiled = pretrain(recipe, tmp_path / "blocks")
    # One frame for three blocks, and none for evaluations or the sample. The other is the check of the compiler.
    assert counters["frames"] == {"total": 2, "ok": 2}
    assert losses(tmp_path / "blocks") == pytest.approx(losses(tmp_path / "none"), rel=1e-5)
    assert compiled.val_loss_folded == pytest.approx(plain.val_loss_folded, rel=1e-5)
    assert compiled.fold_max_abs_logit_drift < 1e-5
    tensors = [load_file(tmp_path / name / "unfolded" / "model.safetensors").keys() for name in ("none", "blocks")]
    assert tensors[0] == tensors[1]

    weights = load_file(tmp_path / "blocks" / "folded" / "model.safetensors")
    shutil.rmtree(tmp_path / "blocks" / "folded")
    shutil.rmtree(tmp_path / "blocks" / "checkpoints" / "checkpoint-4")
    (tmp_path / "blocks" / "metrics.json").unlink()
    again = pretrain(recipe, tmp_path / "blocks", resume=True)
    assert (again.resumed_at_step, again.val_loss) == (2, compiled.val_loss)
    for name, tensor in load_file(tmp_path / "blocks" / "folded" / "model.safetensors").items():
        assert torch.equal(tensor, weights[name])


@pytest.mark.usefixtures("graphs_without_kernels")
def test_gradients_of_compiled_blocks_that_are_computed_again_under_a_loss_by_chunks() -> None:
    memory = {"train.activation_checkpointing": "block", "train.chunked_loss": True}
    recipe = RECIPES["demo"].override({**SMALL_MODEL, **memory})
    ids = torch.arange(2 * 16).view(2, 16)
    found = []
    for how in ("none", "blocks"):
        model = build_model(recipe, 61).train()
        assert compile_(model, how) == (() if how == "none" else ("model.layers.0", "model.layers.1"))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-4, atol=1e-7), name


@pytest.mark.usefixtures("graphs_without_kernels")
def test_blocks_that_keep_their_latents_are_right_where_they_are_asked_to_be_compiled() -> None:
    recipe = RECIPES["demo"].override({**SMALL_MODEL, "train.activation_checkpointing": "latents"})
    ids = torch.arange(2 * 16).view(2, 16)
    found = []
    for how in ("none", "blocks"):
        model = build_model(recipe, 61).train()
        compile_(model, how)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-7) for one, other in zip(*found, strict=True))


@pytest.mark.usefixtures("graphs_without_kernels")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler does it itself
@pytest.mark.parametrize("chunks", [False, True])
def test_gradients_of_a_model_that_is_compiled_as_one(chunks: bool) -> None:
    """What `step` compiles; the CUDA graphs that record it need a GPU."""
    recipe = RECIPES["demo"].override({**SMALL_MODEL, "train.chunked_loss": chunks})
    batches = [torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    counters.clear()
    found = []
    for how in ("none", "step"):
        model = build_model(recipe, 61).train()
        assert compile_(model, how) == (() if how == "none" else ("",))
        for ids in batches:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert counters["stats"]["unique_graphs"] >= 1
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-4, atol=1e-7), name


def test_what_is_compiled_where() -> None:
    assert resolve_compile(TrainConfig(), "cpu") == "none"
    assert resolve_compile(TrainConfig(), "mps") == "none"
    assert resolve_compile(TrainConfig(activation_checkpointing="latents"), "cuda") == "none"
    assert resolve_compile(TrainConfig(compile="none"), "cuda") == "none"
    with pytest.raises(ValueError, match="records CUDA graphs, and the device here is cpu"):
        resolve_compile(TrainConfig(compile="step"), "cpu")


def test_a_compiler_that_is_missing_is_found_before_any_work(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(inductor.cpp, "cxx", ("none-such-compiler",))
    monkeypatch.setattr(inductor, "fx_graph_cache", False)
    check_compiler("none", "cpu")
    with pytest.raises(ValueError, match=r"train\.compile blocks: torch\.compile does not work here, set"):
        pretrain(load_recipe(str(recipe_file), {**SHORT, "train.compile": "blocks"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
