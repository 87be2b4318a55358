"""Runs that begin with weights that exist: of a run, folded or not, of another rank, and dense."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from foldrank.cli import main
from foldrank.hf.checkpoint import load
from foldrank.recipes import load_recipe
from foldrank.train.lineage import initialize_
from foldrank.train.metrics import RunMetrics
from foldrank.train.model import build_model
from foldrank.train.pretrain import pretrain
from foldrank.train.run_folder import RunFolder

from ..small_runs import SMALL_MODEL

SHORT: dict[str, Any] = {**SMALL_MODEL, "train.steps": 4, "train.eval_every": 2, "train.save_every": 2}
PLAIN: dict[str, Any] = {"low_rank.activation": None, "low_rank.residual": None}


@pytest.fixture(scope="module")
def recipes(recipe_file: Path) -> Any:
    return lambda **more: load_recipe(
        str(recipe_file), {**SHORT, **{name.replace("__", "."): value for name, value in more.items()}}
    )


@pytest.fixture(scope="module")
def finished(recipes: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of CoLA with DLR, one of plain low rank, and one of a dense model, on the same data."""
    root = tmp_path_factory.mktemp("finished")
    dense = {name: value for name, value in SHORT.items() if not name.startswith("low_rank")}
    kinds = {
        "cola-dlr": recipes(),
        "lowrank": recipes(low_rank__activation=None, low_rank__residual=None),
        "dense": recipes().override({**dense, "low_rank": None}),
    }
    for name, recipe in kinds.items():
        pretrain(recipe, root / name, quiet=True)
    return {name: root / name for name in kinds}


def validation_at_start(recipe: Any, source: Path, tmp_path: Path) -> RunMetrics:
    """A run whose learning rate is next to nothing: its losses are those of its start."""
    still = recipe.override({"train.learning_rate": 1e-12, "train.steps": 2})
    return pretrain(still, tmp_path / "still", init_from=source, quiet=True)


@pytest.mark.parametrize("part", ["", "folded", "unfolded", "checkpoints/checkpoint-4"])
@pytest.mark.parametrize("residual", [True, False])
def test_it_begins_where_the_other_ended(
    recipes: Any, finished: dict[str, Path], tmp_path: Path, part: str, residual: bool
) -> None:
    recipe = recipes() if residual else recipes(low_rank__residual=None)
    then = RunMetrics.read(finished["cola-dlr"] / "metrics.json")
    now = validation_at_start(recipe, finished["cola-dlr"] / part, tmp_path)
    assert now.val_loss == pytest.approx(then.val_loss, rel=1e-6)
    assert now.val_loss_folded == pytest.approx(then.val_loss, rel=1e-6)
    assert len(now.lineage) == 1
    assert now.lineage[0].startswith("began with the weights of the ")
    run_id = RunFolder(finished["cola-dlr"]).read_config().id
    assert (f"the run {run_id} (sha256 " in now.lineage[0]) == (part == "")


def test_a_dense_model_is_approximated(recipes: Any, finished: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipes(low_rank__activation=None)
    then = RunMetrics.read(finished["dense"] / "metrics.json")
    losses = {}
    for rank in (2, 16, 32):
        now = validation_at_start(recipe.override({"low_rank.rank": rank}), finished["dense"], tmp_path / str(rank))
        losses[rank] = now.val_loss
        assert "14 of its weights approximated at low rank" in now.lineage[0]
    assert losses[32] == pytest.approx(then.val_loss, rel=1e-5), "full rank"
    assert losses[32] < losses[16] < losses[2]
    # The folded checkpoint is of the same loss, and a plain start is far from it.
    fresh = pretrain(recipe.override({"train.learning_rate": 1e-12}), tmp_path / "fresh", quiet=True)
    assert fresh.val_loss > losses[16]


def test_other_ranks_and_dense_layers_take_the_product(recipes: Any, finished: dict[str, Path], tmp_path: Path) -> None:
    then = RunMetrics.read(finished["lowrank"] / "metrics.json")
    plain = recipes(**{name.replace(".", "__"): value for name, value in PLAIN.items()})
    larger = validation_at_start(plain.override({"low_rank.rank": 12}), finished["lowrank"], tmp_path / "larger")
    assert larger.val_loss == pytest.approx(then.val_loss, rel=1e-5)
    dense = plain.override({"low_rank": None})
    whole = validation_at_start(dense, finished["lowrank"], tmp_path / "whole")
    assert whole.val_loss == pytest.approx(then.val_loss, rel=1e-5)
    assert "approximated" not in whole.lineage[0]
    smaller = validation_at_start(plain.override({"low_rank.rank": 2}), finished["lowrank"], tmp_path / "smaller")
    assert smaller.val_loss > then.val_loss


@pytest.mark.parametrize("scale", [None, 0.5, "trainable"])
@pytest.mark.parametrize("signs", ["none", "random"])
def test_the_residual_and_scale_of_the_new_run_change_nothing(
    recipes: Any, finished: dict[str, Path], scale: Any, signs: str
) -> None:
    recipe = recipes(low_rank__scale=scale).override({"low_rank.residual.signs": signs, "seed": 9})
    other, tokenizer = load(finished["cola-dlr"] / "unfolded")
    model = build_model(recipe, other.config.vocab_size)
    identity = RunFolder(finished["cola-dlr"]).read_config().data
    assert identity is not None
    initialize_(model, finished["cola-dlr"], identity.tokenizer_sha256, seed=0)
    tokens = torch.tensor([tokenizer.encode("def f(x): return x")])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, other(tokens).logits, rtol=1e-4, atol=1e-5)


def test_the_lineage_of_the_other_run_is_told_too(recipes: Any, finished: dict[str, Path], tmp_path: Path) -> None:
    pretrain(recipes(), tmp_path / "second", init_from=finished["cola-dlr"], quiet=True)
    third = pretrain(recipes(), tmp_path / "third", init_from=tmp_path / "second", quiet=True)
    assert len(third.lineage) == 2
    assert RunFolder(tmp_path / "third").read_config().lineage == tuple(third.lineage)
    assert json.loads((tmp_path / "third" / "metrics.json").read_text())["lineage"] == list(third.lineage)


def test_it_goes_on_after_an_interruption(recipes: Any, finished: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(recipes(), out, init_from=finished["cola-dlr"], quiet=True)
    whole = load_file(out / "unfolded" / "model.safetensors")
    shutil.rmtree(out / "checkpoints" / "checkpoint-4")
    (out / "metrics.json").unlink()
    pretrain(recipes(), out, resume=True, quiet=True)
    again = load_file(out / "unfolded" / "model.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("settings", "source", "message"),
    [
        ({}, "dense", "is dense, and no factors approximate a dense weight with silu: take plain low rank"),
        ({"model.num_layers": 3}, "cola-dlr", "has num_hidden_layers 2, and the recipe 3: they must be one"),
        ({"model.hidden_size": 64}, "cola-dlr", "has hidden_size 32, and the recipe 64: they must be one"),
        ({"model.intermediate_size": 60}, "cola-dlr", "has intermediate_size 50, and the recipe 60: they must be one"),
        ({"model.rope_theta": 99.0}, "cola-dlr", "has rope_parameters {'rope_theta': 10000.0, 'rope_type': 'default'}"),
        ({"model.rms_norm_eps": 0.01}, "cola-dlr", "has rms_norm_eps 1e-06, and the recipe 0.01: they must be one"),
        ({"model.num_key_value_heads": 1}, "cola-dlr", "has num_key_value_heads 2, and the recipe 1: they must be one"),
        ({"model.tie_embeddings": "true"}, "cola-dlr", "has a head of its own, and the recipe ties it"),
        ({"low_rank.rank": 5}, "cola-dlr", "cannot be brought into the form that the recipe asks for"),
        (
            {"low_rank": None},
            "cola-dlr",
            "does not fit the recipe: model.layers.0.self_attn.q_proj.weight is",
        ),
        ({"data.vocab_size": 300}, "cola-dlr", "is not the one of the data (sha256"),
        (
            {"train.ablation": "folded"},
            "cola-dlr",
            "--init-from begins with weights that are there",
        ),
        ({"train.sharding": "fsdp", "low_rank.rank": 5}, "cola-dlr", "cannot be brought into the form"),
        ({}, "nowhere", "is no checkpoint"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(
    recipe_file: Path, finished: dict[str, Path], tmp_path: Path, capsys: Any, settings: Any, source: str, message: str
) -> None:
    every = {**SHORT, **settings}
    if settings.get("low_rank", 1) is None:
        every = {name: value for name, value in every.items() if not name.startswith("low_rank.")}
    options = [part for name, value in every.items() for part in (f"--{name}", "null" if value is None else str(value))]
    out = tmp_path / "out"
    where = finished.get(source, tmp_path / "nowhere")
    assert main(["pretrain", str(recipe_file), *options, "--out", str(out), "--init-from", str(where)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert message in said
    assert not out.exists()


def test_one_beginning_alone(recipes: Any, finished: dict[str, Path], tmp_path: Path) -> None:
    other = finished["cola-dlr"]
    with pytest.raises(ValueError, match="it goes with neither --resume nor --branch-from"):
        pretrain(recipes(), tmp_path / "out", init_from=other, branch_from=other, quiet=True)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(other, unfinished)
    (unfinished / "metrics.json").unlink()
    with pytest.raises(ValueError, match="is not finished: finish it with --resume, or take one of its checkpoints"):
        pretrain(recipes(), tmp_path / "out", init_from=unfinished, quiet=True)
