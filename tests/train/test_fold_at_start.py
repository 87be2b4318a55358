"""A run folded before its first step gives what the run with the residual gives."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from foldrank.hf.checkpoint import inspect, load
from foldrank.recipes.reading import load_recipe
from foldrank.recipes.schema import Recipe
from foldrank.train.pretrain import pretrain


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    text = tmp_path_factory.mktemp("text")
    for number in range(40):
        (text / f"{number}.txt").write_text(f"text {number} " + " ".join(str(number * k % 97) for k in range(300)))
    return {
        "sample_tokens": 4,
        "model": {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2},
        "low_rank": {"rank": 4, "activation": "silu", "residual": {"alpha": 1.0}},
        "data": {"source": str(text), "vocab_size": 300, "validation_fraction": 0.2},
        "train": {"steps": 40, "batch_size": 4, "sequence_length": 16, "eval_tokens": 500, "weight_decay": 0.3},
    }


def losses(out: Path) -> list[float]:
    return [
        entry["loss"] for line in (out / "log.jsonl").read_text().splitlines() if "loss" in (entry := json.loads(line))
    ]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_the_residual_form(settings: dict[str, object], seed: int, tmp_path: Path) -> None:
    recipe = Recipe.from_dict(settings).override({"seed": seed})
    with_residual = pretrain(recipe, tmp_path / "residual")
    at_start = pretrain(recipe.override({"train.fold_at_start": True}), tmp_path / "start")
    assert at_start.val_loss == pytest.approx(with_residual.val_loss, rel=1e-6)
    assert at_start.val_loss_folded == pytest.approx(with_residual.val_loss_folded, rel=1e-6)
    assert losses(tmp_path / "start") == pytest.approx(losses(tmp_path / "residual"), rel=1e-4)
    assert with_residual.folded_layers == 14
    assert at_start.folded_layers == 0
    no_decay = pretrain(recipe.override({"train.weight_decay": 0.0}), tmp_path / "plain")
    assert abs(no_decay.val_loss / with_residual.val_loss - 1) > 1e-3


@pytest.fixture(scope="module")
def undisturbed(settings: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folded at its start, with the checkpoints of steps 20 and 40, its last."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    pretrain(Recipe.from_dict(settings).override({"train.fold_at_start": True, "train.save_every": 20}), out)
    return out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_and_resumed_it_ends_as_if_never_interrupted(
    number: signal.Signals, undisturbed: Path, start: Callable[..., BaseProcess], tmp_path: Path
) -> None:
    out, recipe = tmp_path / "run", undisturbed / "config.yaml"
    process = start("pretrain", recipe, "--out", out, "--json", "--train.save_every", 5)
    deadline = time.monotonic() + 120
    while process.is_alive() and not (out / "checkpoints" / "checkpoint-5").exists():
        assert time.monotonic() < deadline, "the run made no progress"
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    assert not (out / "metrics.json").exists(), "it finished before it was stopped"
    resumed = pretrain(load_recipe(str(recipe)).override({"train.save_every": 5}), out, resume=True)
    assert 5 <= resumed.resumed_at_step < 40
    assert losses(out) == losses(undisturbed)
    assert len(losses(out)) == 40
    ours, theirs = (load_file(run / "folded" / "model.safetensors") for run in (out, undisturbed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_of_the_last_step_is_what_is_deployed(undisturbed: Path) -> None:
    checkpoint = undisturbed / "checkpoints" / "checkpoint-40"
    for file in (undisturbed / "folded").iterdir():
        if file.name == "README.md":
            continue  # the card tells what the run measured afterwards
        assert file.read_bytes() == (checkpoint / file.name).read_bytes(), file.name


DEPLOYED = """
import sys
sys.modules["foldrank"] = None  # importing it is now an ImportError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert model.config.use_cache
tokens = AutoTokenizer.from_pretrained(folder)("text 7 21 35", return_tensors="pt").input_ids
save_file({"tokens": tokens, "logits": model(input_ids=tokens).logits.detach()}, out)
"""


def test_a_checkpoint_in_the_middle_is_deployable_without_foldrank(undisturbed: Path, tmp_path: Path) -> None:
    checkpoint = undisturbed / "checkpoints" / "checkpoint-20"
    program = [sys.executable, "-c", DEPLOYED, str(checkpoint), str(tmp_path / "found")]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found")
    model, tokenizer = load(checkpoint)
    assert inspect(checkpoint).state == "folded"
    assert found["tokens"].tolist() == [tokenizer("text 7 21 35").input_ids]
    with torch.no_grad():
        assert torch.equal(model(input_ids=found["tokens"]).logits, found["logits"])


def test_needs_a_residual(settings: dict[str, object], tmp_path: Path) -> None:
    recipe = Recipe.from_dict(settings).override({"train.fold_at_start": True, "low_rank.residual": None})
    with pytest.raises(ValueError, match="no residual"):
        pretrain(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
