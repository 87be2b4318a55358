"""A run that is killed, preempted, or short of disk: it loses minutes, never its result."""

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from foldrank.cli import main

from ..small_runs import without_clock

STEPS = 24
SAVE_EVERY = 3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    text = folder / "text"
    text.mkdir()
    words = random.Random(0)
    for number in range(60):
        lines = [" ".join(words.choices(["alpha", "beta", "gamma", "delta", "x", "=", "1"], k=12)) for _ in range(40)]
        (text / f"{number}.txt").write_text(f"document {number}\n" + "\n".join(lines))
    settings = {
        "base": "demo",
        "sample_tokens": 4,
        "model": {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2},
        "low_rank": {"rank": 4},
        "data": {"source": str(text), "vocab_size": 300, "validation_fraction": 0.2},
        "train": {
            "steps": STEPS,
            "batch_size": 4,
            "sequence_length": 16,
            "eval_every": 10,
            "save_every": SAVE_EVERY,
            "eval_tokens": 500,
        },
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(["pretrain", str(recipe), "--out", str(out), "--json"]) == 0
    return out


def logged(out: Path) -> list[dict[str, float]]:
    """The log's losses by step; a last line that is cut short does not count."""
    if not (out / "log.jsonl").exists():
        return []
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    kept = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    return [
        {key: entry[key] for key in kept if key in entry}
        for entry in entries
        if "loss" in entry or "eval_loss" in entry
    ]


def wait_until(condition: Callable[[], bool], process: BaseProcess) -> None:
    deadline = time.monotonic() + 120
    while process.is_alive() and not condition():
        assert time.monotonic() < deadline, "the run made no progress"


def assert_same_run(out: Path, other: Path) -> None:
    assert logged(out) == logged(other)
    for part in ("unfolded", "folded"):
        one, two = load_file(out / part / "model.safetensors"), load_file(other / part / "model.safetensors")
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = (without_clock(json.loads((run / "metrics.json").read_text())) for run in (out, other))
    for key in ("val_loss", "val_loss_folded", "history", "sample"):
        assert one[key] == two[key]


def test_killed_again_and_again_it_ends_as_if_never_interrupted(
    recipe: Path, undisturbed: Path, start: Callable[..., BaseProcess], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    chance = random.Random(1)
    partial = out / "checkpoints" / "partial"
    kills = during_save = 0
    resume: list[str] = []
    while kills < 6:
        process = start("pretrain", recipe, "--out", out, "--json", *resume)
        done = max((entry["step"] for entry in logged(out)), default=0) if resume else 0
        in_save = chance.random() < 0.5
        target = min(done + chance.randint(1, 2), STEPS)

        def reached(target: float = target, in_save: bool = in_save) -> bool:
            if in_save:
                with suppress(FileNotFoundError):  # it goes while we look
                    return any(partial.glob("*/*"))
                return False
            return max((entry["step"] for entry in logged(out)), default=0) >= target

        wait_until(reached, process)
        during_save += in_save and process.is_alive()
        process.kill()
        process.join()
        kills += 1
        if (out / "metrics.json").exists():
            break
        if (out / "config.yaml").exists():
            resume = ["--resume"]
    assert kills == 6
    assert during_save >= 2
    final = start("pretrain", recipe, "--out", out, "--json", "--resume")
    final.join()
    assert final.exitcode == 0
    assert_same_run(out, undisturbed)
    assert not partial.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(
    number: signal.Signals, recipe: Path, undisturbed: Path, start: Callable[..., BaseProcess], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start("pretrain", recipe, "--out", out, "--json", "--train.save_every", STEPS)
    wait_until(lambda: len(logged(out)) >= 3, process)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"checkpoint-{int(logged(out)[-1]['step'])}"]
    assert (
        main(["pretrain", str(recipe), "--out", str(out), "--json", "--resume", "--train.save_every", str(STEPS)]) == 0
    )
    assert_same_run(out, undisturbed)


@pytest.fixture
def interrupted(recipe: Path, start: Callable[..., BaseProcess], tmp_path: Path) -> Path:
    """A run killed after its second checkpoint."""
    out = tmp_path / "run"
    process = start("pretrain", recipe, "--out", out, "--json")
    wait_until(lambda: (out / "checkpoints" / f"checkpoint-{2 * SAVE_EVERY}").exists(), process)
    process.kill()
    process.join()
    for newer in (out / "checkpoints").iterdir():
        if newer.name not in (f"checkpoint-{SAVE_EVERY}", f"checkpoint-{2 * SAVE_EVERY}"):
            shutil.rmtree(newer)
    return out


def test_an_interrupted_run_is_named_and_not_overwritten(
    interrupted: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", str(recipe), "--out", str(interrupted)]) == 2
    message = capsys.readouterr().err
    assert "did not finish" in message
    assert "--resume" in message


@pytest.mark.parametrize(
    ("file", "damage"), [("optimizer.pt", "truncate"), ("model.safetensors", "alter"), ("rng_state.pth", "delete")]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(
    file: str, damage: str, interrupted: Path, recipe: Path, capsys: pytest.CaptureFixture[str], undisturbed: Path
) -> None:
    newest = interrupted / "checkpoints" / f"checkpoint-{2 * SAVE_EVERY}"
    before = interrupted / "checkpoints" / f"checkpoint-{SAVE_EVERY}"
    assert before.exists()
    content = (newest / file).read_bytes()
    if damage == "truncate":
        (newest / file).write_bytes(content[: len(content) // 2])
    elif damage == "alter":
        (newest / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        (newest / file).unlink()
    assert main(["pretrain", str(recipe), "--out", str(interrupted), "--resume"]) == 2
    message = capsys.readouterr().err
    assert str(newest / file) in message
    assert f"--resume {before}" in message
    assert main(["pretrain", str(recipe), "--out", str(interrupted), "--json", "--resume", str(before)]) == 0
    assert_same_run(interrupted, undisturbed)


def test_other_settings_do_not_go_on(interrupted: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pretrain", str(recipe), "--out", str(interrupted), "--resume", "--train.learning_rate", "0.1"]
    assert main(command) == 2
    assert "train.learning_rate was 0.008 and is 0.1" in capsys.readouterr().err


def test_nothing_to_resume(undisturbed: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", str(recipe), "--out", str(tmp_path / "none"), "--resume"]) == 2
    assert "no run" in capsys.readouterr().err
    assert main(["pretrain", str(recipe), "--out", str(undisturbed), "--resume"]) == 2
    assert "finished" in capsys.readouterr().err


def test_a_disk_too_small_leaves_the_last_checkpoint_whole(
    interrupted: Path, recipe: Path, start: Callable[..., BaseProcess], tmp_path: Path
) -> None:
    checkpoint = interrupted / "checkpoints" / f"checkpoint-{2 * SAVE_EVERY}"
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    process = start(
        "pretrain", recipe, "--out", interrupted, "--resume", "--json", file_bytes=30_000, errors=tmp_path / "errors"
    )
    process.join()
    assert process.exitcode == 2
    message = (tmp_path / "errors").read_text()
    assert "was not written" in message
    assert f"{checkpoint} is whole" in message
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before
    assert not (interrupted / "checkpoints" / "partial").exists()


def test_a_loss_that_is_not_finite_stops_the_run(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    # Each step multiplies the weights by some thousands: beyond float32 on any processor.
    command = ["pretrain", str(recipe), "--out", str(out), "--train.max_grad_norm", "1e6"]
    assert (
        main([*command, "--train.learning_rate", "100", "--train.weight_decay", "100", "--train.save_every", "1"]) == 2
    )
    message = capsys.readouterr().err.splitlines()[-1]
    # Told by loss or gradient of a step, or by the weights before it, as the processor rounds.
    told = r"the (loss|gradient norm) of step (\d+) is|after step (\d+) "
    step = int(re.search(told, message)[0].split("step ")[1].split()[0])  # pyright: ignore[reportOptionalSubscript]
    assert all(int(path.name.split("-")[1]) < step for path in (out / "checkpoints").iterdir())
    for folder in (out / "checkpoints").iterdir():
        assert all(bool(weight.isfinite().all()) for weight in load_file(folder / "model.safetensors").values())
