"""In two processes, under DDP and under FSDP2 with real shards: residual, anchored decay and fold are those of one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foldrank.core.config import EXPANSIONS

ROUNDING = 1e-11
"""In float64, after some steps of AdamW."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("sharded") / "found"
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", *launch, "-m", "tests.core.two_processes", str(out)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2))
    assert one == two
    return one


@pytest.mark.parametrize("case", [*(f"anchored {expansion}" for expansion in EXPANSIONS), "anchored after", "late"])
def test_anchored_decay_equals_the_residual_unsharded(found: dict[str, Any], case: str) -> None:
    assert found[case] < ROUNDING


@pytest.mark.parametrize("case", EXPANSIONS)
def test_under_ddp_both_forms_equal_the_residual_in_one_process(found: dict[str, Any], case: str) -> None:
    anchored, residual = found[f"parallel {case}"]
    assert anchored < ROUNDING
    assert residual < ROUNDING


@pytest.mark.parametrize("case", [*EXPANSIONS, "trainable"])
def test_the_residual_trains_and_folds_as_unsharded(found: dict[str, Any], case: str) -> None:
    before, folded, by_state = found[f"residual {case}"]
    assert before < ROUNDING
    assert folded < ROUNDING
    assert by_state < ROUNDING


def test_optimizers_for_factors_take_the_steps_of_unsharded_ones(found: dict[str, Any]) -> None:
    assert len(found["factor optimizers"]) == 2
    assert max(found["factor optimizers"]) < ROUNDING


def test_attached_weights_train_but_fold_through_the_state(found: dict[str, Any]) -> None:
    distance, error = found["attached"]
    assert distance < ROUNDING
    assert "fold the full state dict" in error


def test_factors_sharded_apart_compute_and_fold_with_their_layer(found: dict[str, Any]) -> None:
    distance, error = found["apart"]
    assert distance < ROUNDING
    assert "0.up cannot be folded, because it is a FSDPLinear" in error


def test_what_cannot_work_says_so(found: dict[str, Any]) -> None:
    assert "build it from this model, after fully_shard" in found["stale"]
    assert "0.up.weight holds NaN or infinity" in found["not finite"]
