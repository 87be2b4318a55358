"""What goes wrong slowly is said once, and logged."""

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from foldrank.train.health import NEWEST, RECENT, Health


class Watched:
    """A run's log entries, one after another."""

    def __init__(self, folder: Path, *, quiet: bool = False) -> None:
        self.health = Health(quiet=quiet)
        self.arguments = TrainingArguments(output_dir=str(folder))
        self.state = TrainerState()
        self.state.max_steps = 10_000
        self.notes: list[tuple[int, str]] = []

    def log(self, **logs: Any) -> None:
        self.state.global_step += 1
        entry = {"loss": 3.0, **logs}
        self.health.on_log(self.arguments, self.state, TrainerControl(), logs=entry)
        if "note" in entry:
            self.notes.append((self.state.global_step, entry["note"]))


def test_spikes_are_said_and_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watched = Watched(tmp_path)
    for step in range(RECENT):
        watched.log(grad_norm=1.0 + step % 3)
    watched.log(grad_norm=15.0)
    watched.log(grad_norm=25.0, loss=4.5)
    watched.log(grad_norm=2.0)
    assert watched.notes == [(RECENT + 2, "gradient norm 25, usually 2; loss 4.5000, usually 3.0000")]
    assert capsys.readouterr().err == f"step {watched.notes[0][0]}: {watched.notes[0][1]}\n"


def test_quiet_logs_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watched = Watched(tmp_path, quiet=True)
    for _ in range(RECENT):
        watched.log(grad_norm=1.0)
    watched.log(grad_norm=11.0)
    assert [step for step, _ in watched.notes] == [RECENT + 1]
    assert capsys.readouterr().err == ""


def test_a_fall_of_the_speed_to_half_is_said_once_and_its_end(tmp_path: Path) -> None:
    watched, clock = Watched(tmp_path, quiet=True), 0.0
    for seconds in [0.1] * (RECENT + 2) + [5.0] + [0.1] * 3 + [0.25] * 20 + [0.1] * 20:
        clock += seconds
        watched.log(seconds=clock)
    # One slow step, such as the one after a checkpoint, is none.
    assert [note for _, note in watched.notes] == [
        "a step takes 0.25 s, usually 0.1 s",
        "steps are as fast as usual again",
    ]
    assert watched.notes[0][0] == RECENT + 2 + 4 + NEWEST // 2 + 1


def test_a_disk_without_room_for_the_next_checkpoint_is_said_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    watched = Watched(tmp_path, quiet=True)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.safetensors").write_bytes(bytes(1 << 20))
    watched.health.on_save(watched.arguments, watched.state, TrainerControl())
    watched.log()
    assert watched.notes == []
    monkeypatch.setattr("foldrank.train.health.shutil.disk_usage", lambda _: usage(1 << 30, 1 << 30, 1000))
    watched.log()
    watched.log()
    assert watched.notes == [(2, "the disk has 0.00 GiB left, and the next checkpoint takes 0.00 GiB")]
