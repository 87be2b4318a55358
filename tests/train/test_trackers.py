"""Further logs, by the libraries that write them: each has the run under its name, with the losses of the run's own."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.apart


def test_each_tracker_has_the_run_by_its_name_and_its_losses(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "wide"
    command = [sys.executable, "-m", "foldrank", "pretrain", recipe_file, "--out", out]
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path)}
    for name in ("WANDB_PROJECT", "WANDB_DIR"):
        environment.pop(name, None)
    subprocess.run(
        [*command, "--train.report_to", "[tensorboard, trackio, wandb]", "--seed", "7"],
        cwd=tmp_path,
        env=environment,
        check=True,
        timeout=300,
        capture_output=True,
    )
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert len(losses) > 3

    events = EventAccumulator(str(next((out / "checkpoints/runs").iterdir()))).Reload()
    tensorboard = {event.step: event.value for event in events.Scalars("train/loss")}
    assert tensorboard == pytest.approx(losses, rel=1e-6)  # in float32

    with sqlite3.connect(tmp_path / "foldrank.db") as trackio:
        metrics = [
            json.loads(row) for (row,) in trackio.execute("select metrics from metrics where run_name = 'wide-seed7'")
        ]
    assert {row["train/global_step"]: row["train/loss"] for row in metrics if "train/loss" in row} == losses

    (wandb,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    recorded = wandb.read_bytes()
    assert b"wide-seed7" in recorded
    assert all(repr(loss).encode() in recorded for loss in losses.values())
