"""Several processes in float64: by DDP, FSDP2, tensor parallelism and both they come to the weights of one."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from .runs import (
    BOTH,
    COLA,
    FOLDED,
    FSDP,
    LONG,
    MUON,
    NO_RESIDUAL,
    PLAIN,
    SPLIT,
    STREAM,
    TWO_BLOCKS,
    distance,
    launch,
    losses,
    metrics,
    run,
    texts,
)

pytestmark = pytest.mark.apart

CHUNKS, PASSES = {"train.chunked_loss": True}, {"train.micro_batch_size": 1}

ARMS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "DDP, residual": ({}, {**COLA, **MUON, **LONG}),
    "DDP, folded at the start": ({}, {**PLAIN, **FOLDED, **LONG}),
    "FSDP, residual, AdamW": (FSDP, {**COLA, **LONG}),
    "FSDP, residual, Muon": (FSDP, {**PLAIN, **MUON, **LONG}),
    "FSDP, folded at the start, Muon": (FSDP, {**COLA, **FOLDED, **MUON, **LONG}),
    "FSDP, folded at the start, AdamW": (FSDP, {**PLAIN, **FOLDED, **LONG}),
    "FSDP, no residual, accumulated": (FSDP, {**COLA, **NO_RESIDUAL, **PASSES, **TWO_BLOCKS}),
    "split, folded at the start, AdamW": (SPLIT, {**COLA, **FOLDED, **LONG}),
    "split, folded at the start, Muon": (SPLIT, {**PLAIN, **FOLDED, **MUON, **LONG}),
    "split, no residual, by chunks": (SPLIT, {**COLA, **NO_RESIDUAL, **CHUNKS, **LONG}),
    "split, dense": (SPLIT, {"low_rank": None, **TWO_BLOCKS}),
    "split, Qwen3": (SPLIT, {**COLA, **FOLDED}),
    "both, folded at the start, Muon": (BOTH, {**PLAIN, **FOLDED, **MUON}),
    "both, no residual, accumulated, by chunks": (BOTH, {**COLA, **NO_RESIDUAL, **CHUNKS, **PASSES}),
    "both, dense": (BOTH, {"low_rank": None}),
    "both, Qwen3, accumulated": (BOTH, {**COLA, **FOLDED, **PASSES}),
    "stream, folded at the start, AdamW": (STREAM, {**COLA, **FOLDED}),
    "stream, folded at the start, Muon, by chunks": (STREAM, {**PLAIN, **FOLDED, **MUON, **CHUNKS}),
    "stream and shares, Qwen3": ({**STREAM, **FSDP}, {**COLA, **FOLDED}),
}
"""How the processes share the work, and what they train."""

PROCESSES = {
    arm: 4 if FSDP.items() <= how.items() and SPLIT.items() <= how.items() else 2 for arm, (how, _) in ARMS.items()
}

AGAIN = {
    "both, Qwen3, accumulated": (2, SPLIT),
    "both, folded at the start, Muon": (2, FSDP),
    "split, folded at the start, AdamW": (4, BOTH),
    "FSDP, folded at the start, AdamW": (2, STREAM),
}
"""What goes on from the middle in so many processes, which share the work in another way."""


def begin(tiny: Path, arm: str, how: Mapping[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    recipe = tiny.with_name("qwen3.yaml") if "Qwen3" in arm else tiny
    return run(recipe, {**how, **ARMS[arm][1]}, out, **more)


@pytest.fixture(scope="module")
def float64(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each arm in one process and in two or four, and `again`."""
    folder = tmp_path_factory.mktemp("arms")
    for processes in (1, 4, 2):
        runs = [
            begin(tiny, arm, how if processes > 1 else {}, folder / str(processes) / arm)
            for arm, (how, _) in ARMS.items()
            if processes in (1, PROCESSES[arm])
        ]
        launch({"runs": runs}, folder / str(processes), processes=processes, dtype="float64")
    for arm in AGAIN:
        forget_the_end(folder / str(PROCESSES[arm]) / arm, folder / "again" / arm)
    for processes in (2, 4):
        goes = [(arm, how) for arm, (count, how) in AGAIN.items() if count == processes]
        runs = [begin(tiny, arm, how, folder / "again" / arm, resume=True) for arm, how in goes]
        launch({"runs": runs}, folder / f"again-{processes}", processes=processes, dtype="float64")
    return folder


def forget_the_end(run: Path, out: Path) -> None:
    """A copy of a run that knows its first half alone."""
    shutil.copytree(run, out)
    last = max(out.glob("checkpoints/checkpoint-*"), key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]))
    for later in (last, out / "unfolded", out / "folded"):
        shutil.rmtree(later)
    (out / "metrics.json").unlink()


@pytest.mark.parametrize("arm", ARMS)
def test_several_processes_come_to_the_weights_of_one(float64: Path, arm: str) -> None:
    one, two = (float64 / str(processes) / arm for processes in (1, PROCESSES[arm]))
    assert metrics(two)["val_loss_folded"] == pytest.approx(metrics(one)["val_loss_folded"], rel=1e-9)
    assert distance(one, two) < 1e-9
    steps = metrics(one)["steps"]
    assert len(losses(one)) == steps == ARMS[arm][1].get("train.steps", 8)
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)  # Trainer logs them in float32
    assert texts(two) == texts(one)
    assert [step for step, _ in texts(two)] == [steps]
    assert metrics(two)["start_loss"] == pytest.approx(metrics(one)["start_loss"], rel=1e-9)


@pytest.mark.parametrize("arm", AGAIN)
def test_a_run_goes_on_spread_in_another_way(float64: Path, arm: str) -> None:
    one, out = float64 / "1" / arm, float64 / "again" / arm
    assert distance(one, out) < 1e-9
    assert losses(out) == pytest.approx(losses(one), rel=1e-6)
