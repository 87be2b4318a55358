"""What runs on a CPU runs on a GPU, to rounding. Skipped without one; `benchmarks/gpu.sh tests` runs these."""

import shutil
from pathlib import Path

import pytest
import torch

from foldrank.recipes.reading import load_recipe
from foldrank.train.model import build_model
from foldrank.train.pretrain import pretrain

from ..called import Foldrank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("compile_", ["none", "blocks", "step"])
def test_a_run_is_that_of_a_cpu(recipe_file: Path, tmp_path: Path, compile_: str) -> None:
    settings = {"train.steps": 6, "train.eval_every": 3, "train.save_every": 3}
    cpu = pretrain(load_recipe(str(recipe_file), {**settings, "train.device": "cpu"}), tmp_path / "cpu", quiet=True)
    recipe = load_recipe(str(recipe_file), {**settings, "train.compile": compile_})
    gpu = pretrain(recipe, tmp_path / "gpu", quiet=True)
    assert gpu.device.startswith("cuda")
    assert gpu.val_loss == pytest.approx(cpu.val_loss, rel=2e-3)  # products in TF32
    assert gpu.fold_max_abs_logit_drift < 1e-3
    assert gpu.peak_memory_bytes is not None
    assert [point.val_loss for point in gpu.history] == pytest.approx([p.val_loss for p in cpu.history], rel=2e-3)

    shutil.rmtree(tmp_path / "gpu" / "checkpoints" / "checkpoint-6")
    shutil.rmtree(tmp_path / "gpu" / "folded")
    (tmp_path / "gpu" / "metrics.json").unlink()
    again = pretrain(recipe, tmp_path / "gpu", resume=True, quiet=True)
    assert again.resumed_at_step == 3
    assert again.val_loss == pytest.approx(gpu.val_loss, rel=1e-4)


def test_a_start_is_that_of_a_cpu_to_the_last_bit(recipe_file: Path) -> None:
    recipe = load_recipe(str(recipe_file))
    here, there = (build_model(recipe, 320, device=device).state_dict() for device in ("cpu", "cuda"))
    assert all(torch.equal(tensor, there[name].cpu()) for name, tensor in here.items())


def test_bfloat16_takes_the_flash_kernel(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(recipe_file), {"train.steps": 2, "train.dtype": "bfloat16"})
    assert pretrain(recipe, tmp_path / "run", quiet=True).val_loss > 0


def test_commands_on_a_checkpoint(foldrank: Foldrank, recipe_file: Path, tmp_path: Path) -> None:
    assert foldrank("pretrain", recipe_file, "--out", tmp_path / "run", "--train.steps", 3).code == 0
    folded = tmp_path / "run" / "folded"
    losses = [foldrank("evaluate", folded, "--device", device, "--json").json["loss"] for device in ("cpu", "cuda")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    greedy = ("--prompt", "bar", "--max-new-tokens", 8, "--temperature", 0)
    texts = [foldrank("generate", folded, *greedy, "--device", device).stdout for device in ("cpu", "cuda")]
    assert texts[0] == texts[1]


def test_out_of_memory_says_what_to_lower(foldrank: Foldrank, recipe_file: Path, tmp_path: Path) -> None:
    torch.cuda.set_per_process_memory_fraction(0.005)
    try:
        big = ("--train.batch_size", 256, "--train.sequence_length", 256, "--train.chunked_loss", "false")
        done = foldrank("pretrain", recipe_file, "--out", tmp_path / "run", *big, "--model.vocab_size", 60_000)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert done.code == 2
    assert "out of memory: the plan is " in done.stderr.splitlines()[-1]
