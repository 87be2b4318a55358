"""The same fine-tuning shared by two processes: they come to what one does."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from foldrank.cli import main
from tests.called import Foldrank
from tests.finetune.examples import labelled, prompts, write
from tests.small_runs import Run

from .launch import together

pytestmark = pytest.mark.apart


def command(arguments: Sequence[str]) -> int:
    return main(list(arguments))


@pytest.mark.parametrize("task", ["language", "classification"])
def test_two_processes_come_to_what_one_does(finished_run: Run, task: str, tmp_path: Path, foldrank: Foldrank) -> None:
    # 32 examples in batches of 8: an epoch that ends in the middle of a batch is filled up with examples by accelerate.
    rows: Any = prompts(40) if task == "language" else labelled(40)
    file, held_out = write(tmp_path / "a.jsonl", rows[:32]), write(tmp_path / "b.jsonl", rows[32:])
    call = ["finetune", str(finished_run.out / "folded"), "--data", str(file), "--held-out", str(held_out)]
    call += ["--task", task, "--save-every", "4", "--log-every", "1"]
    call += ["--epochs", "2", "--batch-size", "8", "--learning-rate", "0.01"]
    one = foldrank(*call, "--out", tmp_path / "one", "--device", "cpu", "--json").json
    launch = tmp_path / "launch"
    assert together(command, launch, [*call, "--out", str(tmp_path / "two"), "--json"], processes=2) == [0, 0]
    first, second = ((launch / f"{rank}.output").read_text() for rank in range(2))
    assert second == ""  # the first alone prints
    two = json.loads(first)
    assert two["training_examples"] == one["training_examples"] == 32
    for when in ("before", "after"):
        assert two[when] == pytest.approx(one[when], rel=1e-4)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)
    assert any((tmp_path / "two" / "checkpoints").iterdir())
