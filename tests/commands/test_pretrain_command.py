"""`foldrank pretrain`: what it prints and leaves behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from foldrank.commands.progress import PreparationProgressBar
from foldrank.recipes import RECIPES
from foldrank.recipes.reading import load_recipe

from ..called import Foldrank, tree
from ..small_runs import Run, without_clock

KEYS = {
    *("params", "params_dense", "tokens", "tokens_per_second", "val_loss", "val_perplexity", "val_loss_folded"),
    *("fold_max_abs_logit_drift", "fold_argmax_agreement", "recipe", "seed", "versions"),
}


def test_metrics_hold_the_figures(finished_run: Run) -> None:
    metrics = finished_run.metrics
    assert metrics.keys() >= KEYS
    assert (metrics["recipe"], metrics["seed"], metrics["steps"], metrics["tokens"]) == ("small", 0, 12, 12 * 4 * 32)
    assert 0 < metrics["params"] < metrics["params_dense"]
    assert metrics["tokens_per_second"] == pytest.approx(metrics["tokens"] / metrics["seconds"])
    assert metrics["versions"].keys() >= {"python", "foldrank", "torch", "transformers"}
    assert metrics["sample"].startswith("bar")


def test_the_folder_holds_what_the_summary_names(finished_run: Run) -> None:
    names = {path.name for path in finished_run.out.iterdir()}
    assert names == {"config.yaml", "log.jsonl", "metrics.json", "checkpoints", "unfolded", "folded", "report.html"}
    for part in ("folded", "unfolded"):
        files = {path.name for path in (finished_run.out / part).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= files
        assert "modeling_lowrank_llama.py" in files


def test_the_summary_is_for_people(finished_run: Run) -> None:
    said = finished_run.stdout
    metrics = finished_run.metrics
    for figure in (
        f"{metrics['params']:,}",
        f"{metrics['params_dense']:,}",
        f"{metrics['tokens']:,}",
        f"{metrics['tokens_per_second']:,.0f}",
        f"{metrics['val_loss']:.6f}",
        f"{metrics['val_loss_folded']:.6f}",
        f"{metrics['val_perplexity']:.4f}",
        f"{metrics['fold_max_abs_logit_drift']:.2e}",
        f"{metrics['fold_argmax_agreement']:.2%}",
    ):
        assert figure in said
    # Nothing is cut, however long the path is: over several lines it is there to the last character.
    assert "…" not in said
    packed = "".join(said.replace("│", " ").split())
    for place in ("folded", "unfolded", "metrics.json", "config.yaml", "log.jsonl", "report.html"):
        assert str(finished_run.out / place) in packed
    assert "written by the folded model" in said


def test_in_a_process_of_its_own_with_json_it_is_the_same_run(finished_run: Run, tmp_path: Path) -> None:
    """One JSON object on standard output, and to the last bit the run that this process made."""
    program = [sys.executable, "-c", "import sys; from foldrank.cli import main; sys.exit(main())"]
    command = [*program, "pretrain", str(finished_run.recipe), "--out", "again", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=dict(os.environ), timeout=120
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert (printed.pop("out"), printed.pop("page")) == ("again", "again/report.html")
    assert printed == json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert without_clock(printed) == without_clock(finished_run.metrics)
    for name in ("folded/model.safetensors", "unfolded/model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (finished_run.out / name).read_bytes()


def test_a_second_run_is_refused_and_then_replaces(foldrank: Foldrank, finished_run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    few = ("--steps", 2, "--train.eval_every", 2)
    assert foldrank("pretrain", finished_run.recipe, "--out", out, *few).code == 0
    before = tree(out)
    refused = foldrank("pretrain", finished_run.recipe, "--out", out, *few, "--seed", 1)
    assert refused.code == 2
    assert f"{out} holds a finished run (recipe small, seed 0, 2 steps, validation perplexity" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert tree(out) == before
    (out / "left-over").write_text("of the run before")
    replaced = foldrank("pretrain", finished_run.recipe, "--out", out, *few, "--seed", 1, "--overwrite", "--json")
    assert replaced.json["seed"] == 1
    assert not (out / "left-over").exists()
    assert json.loads((out / "metrics.json").read_text())["seed"] == 1


def test_alone_in_an_empty_folder(
    foldrank: Foldrank, finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is named after its recipe; how far it is goes to standard error, and nothing else does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOLDRANK_CACHE", str(tmp_path / "cache"))
    done = foldrank("pretrain", finished_run.recipe, "--steps", 2, "--json")
    assert done.json["out"] == "runs/small"
    assert (tmp_path / "runs" / "small" / "folded").is_dir()
    assert all(line.startswith(("training the tokenizer", "tokenizing", "step ")) for line in done.stderr.splitlines())
    assert "tokenizing ..." in done.stderr
    assert "step      2 of 2  training loss" in done.stderr


def test_interrupted_before_training_it_says_so_and_leaves_nothing(
    foldrank: Foldrank, finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLDRANK_CACHE", str(tmp_path / "cache"))
    # The moment is chosen; the signal is the one of Ctrl-C.
    monkeypatch.setattr(PreparationProgressBar, "__call__", lambda *_: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it
    try:
        done = foldrank("pretrain", finished_run.recipe, "--out", tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.code, done.stdout, done.stderr) == (130, "", "foldrank pretrain: interrupted\n")
    assert not [path for path in tree(tmp_path).items() if path[1] is not None]


def test_an_empty_folder_is_free(foldrank: Foldrank, finished_run: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert foldrank("pretrain", finished_run.recipe, "--out", tmp_path / "run", "--steps", 1).code == 0


@pytest.mark.parametrize("name", RECIPES)
def test_print_config_is_a_recipe(foldrank: Foldrank, name: str, tmp_path: Path) -> None:
    done = foldrank("pretrain", name, "--print_config")
    assert (done.code, done.stderr) == (0, "")
    (tmp_path / "mine.yaml").write_text(done.stdout)
    assert load_recipe(str(tmp_path / "mine.yaml")) == RECIPES[name]


def test_print_config_shows_what_was_replaced(foldrank: Foldrank, tmp_path: Path) -> None:
    options = ("--seed", "3", "--steps", "7", "--low_rank.residual", "null", "--low_rank.rank", "{mlp.up_proj: 4}")
    options += ("--train.betas", "[0.9, 0.95]", "--train.learning_rate", "6e-3", "--model.tie_embeddings", "true")
    shown = yaml.safe_load(foldrank("pretrain", "demo", "--print_config", *options).stdout)
    assert (shown["seed"], shown["train"]["steps"], shown["low_rank"]["residual"]) == (3, 7, None)
    assert shown["low_rank"]["rank"] == {"mlp.up_proj": 4}
    assert (shown["train"]["betas"], shown["train"]["learning_rate"]) == ([0.9, 0.95], 0.006)
    assert shown["model"]["tie_embeddings"] is True
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(shown))
    again = foldrank("pretrain", tmp_path / "mine.yaml", "--print_config", "--json").json
    assert again == {"config": shown}
