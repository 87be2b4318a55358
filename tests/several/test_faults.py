"""Several processes that share a run, and what happens to one of them: a signal, a death, the death of the launcher."""

import json
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .launch import Launcher, free_port, wait

pytestmark = pytest.mark.apart

STEPS = 120
SETTINGS = {"train.steps": STEPS, "train.save_every": 10, "train.eval_every": STEPS, "train.optimizer": "muon"}
IN_TIME = 30.0
"""Seconds after which torchrun kills what is left."""


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by two processes that nothing happens to."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(launched(tiny, out))
    return out


@pytest.fixture(autouse=True)
def none_is_left() -> Iterator[None]:
    """Where a test fails before its processes end, the session would wait for them."""
    yield
    while Launcher.started:
        Launcher.started.pop().kill()


def arguments(tiny: Path, out: Path, *more: str) -> list[str]:
    settings = [part for name, value in SETTINGS.items() for part in (f"--{name}", str(value))]
    return ["pretrain", str(tiny), *settings, "--out", str(out), *more]


def launched(tiny: Path, out: Path, *more: str, processes: int = 2, restarts: int = 0) -> Launcher:
    number = len(list(out.parent.glob("launch-*")))
    to = out.parent / f"launch-{number}"
    return Launcher(arguments(tiny, out, *more), to, nproc_per_node=processes, max_restarts=restarts)


def machine(tiny: Path, out: Path, name: str, port: int) -> Launcher:
    """A launcher as each of one or two machines starts it, with one process; alone it waits a second for the other."""
    return Launcher(
        arguments(tiny, out),
        out.parent / name,
        variables={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        nproc_per_node=1,
        max_nodes=2,
        max_restarts=1,
        run_id="elastic",
        rdzv_endpoint=f"localhost:{port}",
        rdzv_configs={"last_call_timeout": 1, "keep_alive_interval": 1},
    )


def step(out: Path) -> int:
    if not (out / "log.jsonl").exists():
        return 0
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def under_way(tiny: Path, out: Path, least: int, *more: str, restarts: int = 0) -> tuple[Launcher, dict[int, int]]:
    """The launcher of a run that has come to a step, and its processes by rank."""
    launcher = launched(tiny, out, *more, restarts=restarts)
    wait(lambda: step(out) >= least)
    return launcher, launcher.ranks


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def sigterm_waits(process: int) -> bool:
    """Whether a process that is stopped has been sent SIGTERM."""
    status = Path(f"/proc/{process}/status").read_text()
    pending = next(line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:"))
    return bool(int(pending, 16) >> (signal.SIGTERM - 1) & 1)


def ended(launcher: Launcher, processes: Iterable[int]) -> str:
    """What was said on standard error; all have ended in time."""
    began = time.monotonic()
    launcher.ended(IN_TIME)
    wait(lambda: not any(map(is_alive, processes)), IN_TIME - (time.monotonic() - began))
    return launcher.said


def finish(launcher: Launcher) -> None:
    assert launcher.ended(120) == 0, launcher.said


def newest(out: Path) -> int:
    assert not (out / "checkpoints" / "partial").exists()
    return max(int(folder.name.partition("-")[2]) for folder in (out / "checkpoints").glob("checkpoint-*"))


def assert_goes_on(tiny: Path, out: Path, undisturbed: Path, processes: int, *more: str) -> None:
    finish(launched(tiny, out, "--resume", *more, processes=processes))
    if processes == 2:
        assert_same(out, undisturbed)
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (undisturbed, out))
    # Another number of processes sums in another order, and a few hundred steps make it larger.
    assert two["val_loss_folded"] == pytest.approx(one["val_loss_folded"], rel=1e-4)


def assert_same(out: Path, undisturbed: Path) -> None:
    weights = [load_file(folder / "folded" / "model.safetensors") for folder in (undisturbed, out)]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())


def test_a_signal_to_one_process_ends_all_after_one_step(tiny: Path, undisturbed: Path, tmp_path: Path) -> None:
    out, seldom = tmp_path / "run", ("--train.save_every", str(STEPS))
    launcher, processes = under_way(tiny, out, 15, *seldom)
    os.kill(processes[1], signal.SIGTERM)
    said = ended(launcher, processes.values())
    (line,) = {line for line in said.splitlines() if line.startswith("foldrank pretrain: ")}
    at = newest(out)
    assert f"stopped by SIGTERM after step {at} of {STEPS}" in line
    assert at < STEPS  # its own checkpoint: until here there was none
    assert_goes_on(tiny, out, undisturbed, 2, *seldom)


def test_a_process_that_is_killed_ends_all_and_the_run_goes_on(tiny: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    launcher, processes = under_way(tiny, out, 25)
    os.kill(processes[1], signal.SIGKILL)
    said = ended(launcher, processes.values())
    assert "rank 0 of 2 lost the connection to another process" in said
    assert "defect of foldrank" not in said
    assert newest(out) % 10 == 0  # none on the way out
    assert_goes_on(tiny, out, undisturbed, 1)


def test_processes_end_with_a_launcher_that_is_killed(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    launcher, processes = under_way(tiny, out, 5)
    os.kill(launcher.pid, signal.SIGKILL)
    said = ended(launcher, processes.values())
    assert "stopped by SIGTERM after step" in said
    assert 0 < newest(out) < STEPS


def test_a_launcher_that_restarts_its_processes_goes_on(tiny: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    launcher, processes = under_way(tiny, out, 15, restarts=1)
    os.kill(processes[0], signal.SIGKILL)
    finish(launcher)
    assert launcher.ranks[0] != processes[0]
    assert_same(out, undisturbed)


def test_a_sharded_run_ends_and_goes_on_as_well(tiny: Path, tmp_path: Path) -> None:
    how = ("--train.sharding", "fsdp", "--train.optimizer", "adamw", "--train.steps", "60")
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "run"
    finish(launched(tiny, undisturbed, *how))
    launcher, processes = under_way(tiny, out, 15, *how)
    os.kill(processes[1], signal.SIGTERM)
    said = ended(launcher, processes.values())
    at = newest(out)
    assert f"stopped by SIGTERM after step {at} of 60" in said
    assert_goes_on(tiny, out, undisturbed, 2, *how)


def test_a_process_that_stalls_ends_the_run(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    launcher, processes = under_way(tiny, out, 15, "--train.patience", "2")
    os.kill(processes[1], signal.SIGSTOP)
    try:
        wait(lambda: not is_alive(processes[0]), IN_TIME)
    finally:
        os.kill(processes[1], signal.SIGKILL)
    said = ended(launcher, processes.values())
    assert "rank 0 of 2 waited in vain for another process" in said
    assert newest(out) % 10 == 0


def test_a_machine_joins_and_goes_again(tiny: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Begun by one, gone on with by two, ended by one: with the same lines, and without --resume."""
    out, port = tmp_path / "run", free_port()
    first = machine(tiny, out, "first", port)
    wait(lambda: step(out) >= 20)
    (trains,) = first.ranks.values()
    os.kill(trains, signal.SIGSTOP)  # a fast machine would be through before the other has started
    second = machine(tiny, out, "second", port)
    wait(lambda: sigterm_waits(trains))
    os.kill(trains, signal.SIGCONT)
    wait(lambda: len(sessions(out)) == 2 and step(out) >= sessions(out)[1]["step"] + 20)
    assert sessions(out)[1]["step"] >= 20
    second.kill()
    second.ended(IN_TIME)
    finish(first)
    assert [each["event"] for each in sessions(out)] == ["began", "went on", "went on"]
    assert sessions(out)[2]["step"] >= sessions(out)[1]["step"] + 10
    one, two = (json.loads((run / "metrics.json").read_text()) for run in (out, undisturbed))
    assert one["val_loss"] == pytest.approx(two["val_loss"], rel=1e-4)


def sessions(out: Path) -> list[dict[str, Any]]:
    """What the log says of the processes that trained, in turn."""
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True) if (out / "log.jsonl").exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [entry for entry in entries if entry.get("event") in ("began", "went on")]
