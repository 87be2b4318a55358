"""How busy a device is: FLOPs done over FLOPs that could be."""

from pathlib import Path

import pytest

from foldrank.recipes.reading import load_recipe
from foldrank.train.pretrain import pretrain
from foldrank.train.utilization import Utilization, peak_flops_of

from ..called import Foldrank


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "float32", 989e12 / 2),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165e12),
        ("Some other card", "bfloat16", None),
    ],
)
def test_peaks_by_the_name_of_the_device(name: str, dtype: str, peak: float | None) -> None:
    assert peak_flops_of(name, dtype) == peak


def test_utilization_is_over_all_devices_and_none_without_a_peak() -> None:
    flops = {"flops_per_token": 15, "flops_per_step": 1500, "useful_flops_per_step": 1000}
    half = Utilization(**flops, peak_flops=200.0, devices=5, shares=5)
    assert half.of_steps(5, 10.0) == pytest.approx(0.5)
    assert half.of_steps(5, 0.0) is None
    assert Utilization(**flops, peak_flops=None, devices=1, shares=1).of_steps(5, 10.0) is None


def test_a_run_says_how_busy_it_was(foldrank: Foldrank, recipe_file: Path, tmp_path: Path) -> None:
    done = foldrank("pretrain", recipe_file, "--out", tmp_path / "run", "--train.peak_flops", 1e10, "--json")
    metrics = done.json
    assert metrics["mfu"] == pytest.approx(metrics["flops"] / metrics["seconds"] / 1e10)
    assert (metrics["peak_flops"], metrics["micro_batch_size"], metrics["peak_memory_bytes"]) == (1e10, 4, None)
    assert " tokens/s  MFU " in done.stderr


def test_nothing_is_said_of_a_device_that_is_not_known(recipe_file: Path, tmp_path: Path) -> None:
    metrics = pretrain(load_recipe(str(recipe_file), {"train.steps": 2, "train.device": "cpu"}), tmp_path / "run")
    assert (metrics.mfu, metrics.peak_flops) == (None, None)
