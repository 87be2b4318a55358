"""`foldrank factorize` on a dense model that a run made."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from foldrank.cli import main
from foldrank.core.inventory import inventory
from foldrank.hf.checkpoint import load
from foldrank.recipes import load_recipe
from foldrank.train.factorization import spectral_ranks
from foldrank.train.metrics import RunMetrics
from foldrank.train.pretrain import pretrain

from ..small_runs import SMALL_MODEL

EVALUATION = {"train.eval_tokens": 1200}
"""So many that losses of two starts can be told apart."""


@pytest.fixture(scope="module")
def dense(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {name: value for name, value in SMALL_MODEL.items() if not name.startswith("low_rank")}
    recipe = load_recipe(str(recipe_file), {**settings, "train.steps": 30, **EVALUATION, "low_rank": None})
    out = tmp_path_factory.mktemp("dense") / "run"
    pretrain(recipe, out, quiet=True)
    return out


def factorize(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["factorize", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_loss_by_rank(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = factorize(capsys, dense / "unfolded", "--rank", 4, 32)
    losses = {(row["target"]["rank"], row["init"]): row["loss"] for row in result["approximations"]}
    assert result["dense"]["loss"] == pytest.approx(RunMetrics.read(dense / "metrics.json").val_loss)
    assert losses[32, "svd"] == pytest.approx(result["dense"]["loss"], rel=1e-5)
    assert losses[32, "activations"] == pytest.approx(result["dense"]["loss"], rel=1e-5)
    assert losses[4, "activations"] < losses[4, "svd"], "the sample is of the same text"
    assert {(row["smallest_rank"], row["largest_rank"]) for row in result["approximations"]} == {(4, 4), (32, 32)}
    assert main(["factorize", str(dense / "folded"), "--rank", "4", "32"]) == 0
    said = capsys.readouterr().out
    assert f"{losses[4, 'svd']:.4f}" in said
    assert f"{losses[4, 'activations']:.4f}" in said


def test_the_checkpoint_is_of_that_loss_and_trains_on(
    dense: Path, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, sample = tmp_path / "rank-4", tmp_path / "sample.txt"
    sample.write_text("def f(x):\n    return x + 1\n" * 200)
    arguments = (dense / "unfolded", "--rank", 4, "--init", "activations", "--sample", sample, "--out", out)
    (row,) = factorize(capsys, *arguments)["approximations"]
    assert {"model.safetensors", "modeling_lowrank_llama.py", "checksums.json"} <= {path.name for path in out.iterdir()}
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32
    plain = {**SMALL_MODEL, **EVALUATION, "low_rank.rank": 4, "low_rank.activation": None}
    recipe = load_recipe(str(recipe_file), {**plain, "train.steps": 2, "train.learning_rate": 1e-12})
    begun = pretrain(recipe, tmp_path / "run", init_from=out, quiet=True)
    assert begun.val_loss == pytest.approx(row["loss"], rel=1e-5)


def test_a_budget_is_shared_out_evenly_or_by_spectra(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = factorize(capsys, dense / "unfolded", "--budget", 0.8, "--init", "svd")
    even, spectra = result["approximations"]
    assert [row["target"] for row in (even, spectra)] == [
        {"rank": None, "budget": 0.8, "allocation": allocation} for allocation in ("even", "spectra")
    ]
    assert even["parameters"] - 100 < spectra["parameters"] <= even["parameters"] <= 0.8 * result["dense"]["parameters"]
    out = tmp_path / "out"
    chosen = ("--budget", 0.8, "--allocation", "spectra", "--init", "svd", "--out", out)
    (row,) = factorize(capsys, dense / "unfolded", *chosen)["approximations"]
    assert row == spectra
    recipe = load_recipe(str(out / "recipe.yaml"), {"train.steps": 2, "train.learning_rate": 1e-12})
    begun = pretrain(recipe, tmp_path / "run", init_from=out, quiet=True)
    assert begun.params == row["parameters"]
    assert begun.val_loss == pytest.approx(row["loss"], rel=1e-5)


def test_with_a_function_between_the_factors_it_is_by_regression(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (row,) = factorize(capsys, dense / "unfolded", "--rank", 8, "--activation", "silu", "--out", out)["approximations"]
    (plain,) = factorize(capsys, dense / "unfolded", "--rank", 8, "--init", "activations")["approximations"]
    assert row["init"] == "regression"
    assert abs(row["loss"] - plain["loss"]) < 0.05
    recipe = load_recipe(str(out / "recipe.yaml"), {"train.steps": 2, "train.learning_rate": 1e-12})
    assert recipe.low_rank is not None
    assert recipe.low_rank.activation == "silu"
    assert pretrain(recipe, tmp_path / "run", init_from=out, quiet=True).val_loss == pytest.approx(
        row["loss"], rel=1e-5
    )


def test_ranks_by_spectra_leave_the_least_squared_error(dense: Path) -> None:
    model, _ = load(dense / "unfolded")
    specs = inventory(model).linear_specs
    names = [name for name in specs if "layers.0.mlp" in name]
    with torch.no_grad():
        for number, name in enumerate(names):
            weight, _ = specs[name].weight_and_bias()
            weight.zero_()
            weight[:4, :4] = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]) * 10.0**-number)
    assert spectral_ranks(model, dict.fromkeys(names, 3), None) == dict(zip(names, (4, 4, 1), strict=True))
    sample = [{"input_ids": torch.arange(300).view(10, 30)}]
    weighed = spectral_ranks(model, dict.fromkeys(names, 3), sample)
    assert sum(weighed.values()) == 9
    assert min(weighed.values()) >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("unfolded", "--rank", 4, 8, "--out", "OUT"), "--out takes one model: name one --rank, or one --budget"),
        (("unfolded", "--rank", 4, "--out", "OUT"), "--out takes one model: name one --rank, or one --budget"),
        (("unfolded", "--budget", 0.9, "--init", "svd", "--out", "OUT"), "--out takes one model: name one --rank, or"),
        (("unfolded", "--rank", 4, "--init", "regression"), "--init regression goes with --activation"),
        (
            ("unfolded", "--rank", 4, "--activation", "silu", "--init", "svd"),
            "--init regression goes with --activation",
        ),
        (("unfolded",), "give the size: --rank 16, or --budget 0.6"),
        (("unfolded", "--budget", 0.01), "budget 0.01: of"),
        (("unfolded", "--rank", 4, "--init", "svd", "--out", "unfolded"), "exists: choose another folder with --out"),
        (("unfolded", "--rank", 33), "rank 33"),
        (("unfolded", "--rank", 0), "--rank"),
        (("checkpoints", "--rank", 4), "is no checkpoint"),
    ],
)
def test_what_cannot_be_is_one_line(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Any, message: str
) -> None:
    places = {"OUT": tmp_path / "out", "unfolded": dense / "unfolded", "checkpoints": dense / "checkpoints"}
    given = [str(places.get(argument, argument)) for argument in arguments]
    assert main(["factorize", *given]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
