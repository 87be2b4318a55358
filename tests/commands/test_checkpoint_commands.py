"""fold, evaluate, generate and info on what a run left behind."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ..called import Foldrank, tree
from ..small_runs import Run


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(foldrank: Foldrank, finished_run: Run) -> None:
    folded = finished_run.out / "folded"
    for command in (("evaluate", folded), ("generate", folded, "--prompt", "bar")):
        done = foldrank(*command, "--device", "cuda")
        assert (done.code, done.stdout) == (2, "")
        assert "there is no GPU that PyTorch can use" in done.stderr
        assert foldrank(*command, "--device", "cpu").code == 0


def test_fold_writes_what_the_run_folded(foldrank: Foldrank, finished_run: Run, tmp_path: Path) -> None:
    before = tree(finished_run.out)
    done = foldrank("fold", finished_run.out / "unfolded", "--out", tmp_path / "new" / "folded", "--json")
    assert done.json == {
        "checkpoint": str(finished_run.out / "unfolded"),
        "out": str(tmp_path / "new" / "folded"),
        "folded_layers": 14,
    }
    assert done.stderr == ""
    assert tree(finished_run.out) == before
    # But for the card, which tells of the run.
    expected = [file for file in (finished_run.out / "folded").iterdir() if file.name != "README.md"]
    assert {file.name for file in (tmp_path / "new" / "folded").iterdir()} == {file.name for file in expected}
    for file in expected:
        assert (tmp_path / "new" / "folded" / file.name).read_bytes() == file.read_bytes(), file.name


def test_fold_says_what_it_did(foldrank: Foldrank, finished_run: Run, tmp_path: Path) -> None:
    done = foldrank("fold", finished_run.out / "unfolded", "--out", tmp_path / "folded")
    assert done.stdout == f"folded 14 layers of {finished_run.out / 'unfolded'} into {tmp_path / 'folded'}\n"


@pytest.mark.parametrize(("part", "key"), [("unfolded", "val_loss"), ("folded", "val_loss_folded")])
def test_evaluate_reproduces_the_loss_of_the_run(foldrank: Foldrank, finished_run: Run, part: str, key: str) -> None:
    found = foldrank("evaluate", finished_run.out / part, "--batch-size", 4, "--json").json
    assert found["loss"] == finished_run.metrics[key]
    assert found["tokens"] == finished_run.metrics["val_tokens"]
    assert found["sequence_length"] == 32
    for batch_size in (1, 7, 64):
        other = foldrank("evaluate", finished_run.out / part, "--batch-size", batch_size, "--json").json
        assert other["tokens"] == found["tokens"]
        assert other["loss"] == pytest.approx(found["loss"], rel=1e-6)


def test_evaluate_on_text_of_ones_own(foldrank: Foldrank, finished_run: Run, corpus: Path, tmp_path: Path) -> None:
    folded = shutil.copytree(finished_run.out / "folded", tmp_path / "folded")  # away from its run
    one = foldrank("evaluate", folded, "--data", corpus, "--sequence-length", 64, "--json").json
    assert one["sequence_length"] == 64
    longer = foldrank("evaluate", folded, "--data", corpus, "--sequence-length", 65, "--json").json
    assert longer["tokens"] == one["tokens"]  # every token but the first, whatever the length
    assert 3 < one["loss"] < 6
    (tmp_path / "strange.txt").write_text("ZQX" * 400)
    other = foldrank("evaluate", folded, "--data", tmp_path / "strange.txt", "--sequence-length", 64, "--json").json
    assert other["loss"] > one["loss"] + 0.5
    said = foldrank("evaluate", folded, "--data", corpus, "--sequence-length", 64).stdout
    bits = f"bits per byte {one['bits_per_byte']:.4f}"
    assert f"loss {one['loss']:.6f}  perplexity {one['perplexity']:.4f}  {bits}  over {one['tokens']:,} tokens" in said


def test_generate(foldrank: Foldrank, finished_run: Run) -> None:
    def text(part: str = "folded", **options: Any) -> str:
        flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
        done = foldrank(
            "generate", finished_run.out / part, "--prompt", "bar ", "--max-new-tokens", 20, *flags, "--json"
        )
        # The model was trained on 32 tokens, and these prompts and their continuations may be longer.
        assert done.json.keys() - {"notes"} == {"checkpoint", "prompt", "text"}
        assert done.json["text"].startswith("bar ")
        return done.json["text"]

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(temperature=0, seed=1) == text(temperature=0, seed=2)
    assert text(temperature=0) == text("unfolded", temperature=0)
    assert len(text(max_new_tokens=1)) < len(text(max_new_tokens=40))
    plain = foldrank("generate", finished_run.out / "folded", "--prompt", "bar ", "--temperature", 0)
    assert plain.stdout.startswith("bar ")


@pytest.mark.parametrize("prompt", [" ", "\n", "Grüße 世界", "[bold]not markup[/bold]", "-5"])
def test_generate_takes_any_prompt(foldrank: Foldrank, finished_run: Run, prompt: str) -> None:
    done = foldrank("generate", finished_run.out / "folded", f"--prompt={prompt}", "--max-new-tokens", 2)
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout.startswith(prompt)


@pytest.mark.parametrize("part", ["folded", "unfolded"])
def test_info(foldrank: Foldrank, finished_run: Run, part: str) -> None:
    folder = finished_run.out / part
    found = foldrank("info", folder, "--json").json
    assert (found["state"], found["model_type"], found["path"]) == (part, "lowrank_llama", str(folder))
    assert found["params"] == finished_run.metrics["params"]
    assert found["bytes"] == (folder / "model.safetensors").stat().st_size
    assert found["shape"]["hidden_size"] == 32
    assert set(found["low_rank"]["rank"].values()) == {7}
    assert (found["low_rank"]["residual"] is None) is (part == "folded")
    assert sum(found["dtypes"].values()) == sum(
        "residual" not in name for name in load_file(folder / "model.safetensors")
    )
    said = " ".join(foldrank("info", folder).stdout.replace("│", " ").split())
    state = "folded: nothing left to fold" if part == "folded" else "not folded: still has its residual"
    assert f"state {state}" in said
    assert f"parameters {finished_run.metrics['params']:,}" in said
    assert "7 (14 layers)" in said
