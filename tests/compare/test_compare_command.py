"""Whole studies of models so small that a run takes a second: what is planted is found, what is killed goes on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml

from foldrank.cli import main
from foldrank.compare.plan import planned
from foldrank.compare.records import Record, read_records
from foldrank.compare.study_file import load_study
from foldrank.compare.worker import check_records

from ..called import Foldrank
from ..conftest import WORDS
from ..forked import Start
from ..small_runs import without_clock

STUDIES = Path(__file__).parents[2] / "studies"


def write_study(folder: Path, corpus: Path, **changes: Any) -> Path:
    study: dict[str, Any] = {
        "title": "micro",
        "settings": {
            "sample_tokens": 4,
            "train.steps": 10,
            "train.batch_size": 4,
            "train.sequence_length": 32,
            "train.eval_every": 5,
            "train.save_every": 4,
            "train.eval_tokens": 600,
            "train.test_tokens": 600,
            "train.device": "cpu",
            "model.hidden_size": 16,
            "model.intermediate_size": 24,
            "model.num_layers": 1,
            "model.num_heads": 2,
        },
        "corpora": {"words": {"data.source": str(corpus), "data.vocab_size": 300, "data.validation_fraction": 0.2}},
        "sizes": {"micro": {"rank": 4}},
        "sweep": {"learning_rates": [0.005, 0.01], "extend": 0},
        "seeds": [0, 1],
        "methods": ["cola", "cola-dlr"],
    }
    study["settings"] |= changes.pop("settings", {})
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({**study, **changes}))
    return file


def facts(folder: Path) -> dict[str, Any]:
    """All that is known of a study's runs, without what the clock said."""

    def of(record: Record) -> dict[str, Any]:
        metrics = without_clock(record.measured.to_dict()) if record.finished else {}
        for name in ("study_seconds", "resumed_at_step"):
            metrics.pop(name, None)
        return {"error": record.error, "spectra": record.spectra, "recipe": record.recipe, "metrics": metrics}

    return {name: of(record) for name, record in read_records(folder).items()}


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A study and the folder of it, run in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    study = write_study(folder, corpus)
    assert main(["compare", str(study), "--out", str(folder / "out")]) == 0
    return study, folder / "out"


def test_each_run_has_a_record_and_what_is_of_no_more_use_is_gone(undisturbed: tuple[Path, Path]) -> None:
    _, out = undisturbed
    records = read_records(out)
    assert len(records) == 2 * (2 + 2)
    assert all(record.finished for record in records.values())
    for name, record in records.items():
        left = {path.name for path in (out / "runs" / name).iterdir()}
        final = record.stage == "final"
        assert left == {"config.yaml", "log.jsonl", "metrics.json", *(["folded"] if final else [])}
        assert (record.measured.test_loss is not None) == final
        assert bool(record.spectra) == (final and record.seed == 0)
        for values in record.spectra.values():
            assert len(values) == 4
            assert list(values) == sorted(values, reverse=True)


def test_run_again_it_does_nothing(undisturbed: tuple[Path, Path], foldrank: Foldrank) -> None:
    study, out = undisturbed
    before = {file: file.stat().st_mtime_ns for file in out.glob("records/*")}
    done = foldrank("compare", study, "--out", out, "--json")
    assert done.json == {"study": str(out), "finished": 8, "failed": {}, "stopped": 0, "missing": 0}
    assert {file: file.stat().st_mtime_ns for file in out.glob("records/*")} == before


@pytest.mark.apart
def test_killed_again_and_again_it_comes_to_the_same(
    undisturbed: tuple[Path, Path], start: Start, tmp_path: Path
) -> None:
    study, whole = undisturbed
    out = tmp_path / "out"
    chance = random.Random(0)
    for _ in range(5):
        process = start("compare", study, "--out", out)
        begun = len(list(out.glob("runs/*/config.yaml")))
        wait_until(process, lambda begun=begun: len(list(out.glob("runs/*/config.yaml"))) > begun)
        time.sleep(chance.random() / 2)
        process.kill()
        process.join()
    last = start("compare", study, "--out", out)
    last.join()
    assert last.exitcode == 0
    assert facts(out) == facts(whole)


def test_a_signal_saves_and_says_how_to_go_on(undisturbed: tuple[Path, Path], start: Start, tmp_path: Path) -> None:
    study, _ = undisturbed
    out, errors = tmp_path / "out", tmp_path / "errors"
    process = start("compare", study, "--out", out, errors=errors)
    wait_until(process, lambda: bool(list(out.glob("runs/*/log.jsonl"))))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert errors.read_text().rstrip().endswith("foldrank compare: stopped; the same command goes on")


@pytest.mark.apart
def test_machines_share_a_study_and_take_over_from_one_that_is_gone(
    undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    study, whole = undisturbed
    out = tmp_path / "out"

    def begin(machine: str) -> subprocess.Popen[str]:
        # Processes that do not share a cache share no locks: they are as on two machines.
        environment = {**os.environ, "FOLDRANK_CACHE": str(tmp_path / machine), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "foldrank", "compare", str(study), "--out", str(out), "--lease", "2"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def begun() -> int:
        return len(list(out.glob("runs/*/config.yaml")))

    stays, goes = begin("stays"), begin("goes")
    deadline = time.monotonic() + 120
    for least in (2, 4, 6):
        while begun() < least and stays.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        goes.kill()
        goes.communicate()
        goes = begin("goes")
    said = stays.communicate(timeout=120)[1]
    assert stays.returncode == 0, said
    goes.communicate(timeout=120)
    assert goes.returncode == 0
    assert facts(out) == facts(whole)


@pytest.mark.apart
def test_who_was_taken_over_ends(tmp_path: Path) -> None:
    program = f"""
import os, pathlib, time
from foldrank.compare.lease import lease
with lease(pathlib.Path({str(tmp_path)!r}), "run", 1.0) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""

    def holder(machine: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "FOLDRANK_CACHE": str(tmp_path / machine)}
        return subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=-1, stderr=-1, text=True)

    def first_line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    first = holder("one")
    assert first_line(first) == "True"
    refused = holder("two")
    assert first_line(refused) == "False"
    refused.kill()
    first.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    second = holder("two")
    assert first_line(second) == "True"
    first.send_signal(signal.SIGCONT)
    assert "run was taken over by another process" in first.communicate(timeout=30)[1]
    assert first.returncode == -signal.SIGKILL
    assert second.poll() is None
    second.kill()
    # On its own machine there is nothing to wait for.
    third = holder("two")
    assert first_line(third) == "True"
    third.kill()
    for process in (refused, second, third):
        process.communicate()


def wait_until(process: BaseProcess, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while process.is_alive() and not happened():
        assert time.monotonic() < deadline, "the study made no progress"
        time.sleep(0.01)


@pytest.mark.apart
@pytest.mark.parametrize("launcher", ["workers", "torchrun"])
def test_processes_share_the_runs(undisturbed: tuple[Path, Path], tmp_path: Path, launcher: str) -> None:
    study, whole = undisturbed
    out = tmp_path / "out"
    command = ["foldrank.cli", "compare", str(study), "--out", str(out)]
    if launcher == "workers":
        command = [sys.executable, "-m", *command, "--workers", "2"]
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert facts(out) == facts(whole)
    assert done.stdout.count("8 runs finished") == 1


def test_a_run_that_fails_is_kept_as_failed(corpus: Path, tmp_path: Path, foldrank: Foldrank) -> None:
    sweep = {"learning_rates": [1e-2, 100.0], "extend": 0}
    # Each step multiplies the weights by some thousands: beyond float32 on any processor.
    growing = {"train.weight_decay": 100.0, "train.steps": 20}
    study = write_study(tmp_path, corpus, methods=["cola"], sweep=sweep, seeds=[0], settings=growing)
    found = foldrank("compare", study, "--out", tmp_path / "out", "--json").json
    (name,) = found["failed"]
    assert name == "words-micro-cola-lr100-seed1000-sweep"
    assert "Try a lower train.learning_rate" in found["failed"][name]
    assert (found["finished"], found["missing"]) == (2, 0)
    assert read_records(tmp_path / "out")[name].error == found["failed"][name]


def test_a_study_that_changed_is_refused(undisturbed: tuple[Path, Path], foldrank: Foldrank, tmp_path: Path) -> None:
    study, out = undisturbed
    changed = tmp_path / "changed.yaml"
    changed.write_text(study.read_text().replace("train.steps: 10", "train.steps: 11"))
    done = foldrank("compare", changed, "--out", out)
    assert done.code == 2
    assert "train.steps was 10 and is 11" in done.stderr
    assert done.stderr.count("\n") == 1


def test_text_that_changed_is_refused(tmp_path: Path, foldrank: Foldrank) -> None:
    text = tmp_path / "text"
    text.mkdir()
    words = random.Random(0)
    for number in range(40):
        (text / f"{number}.txt").write_text(" ".join(words.choices(WORDS, k=300)))
    study = write_study(tmp_path, text, methods=["cola"], seeds=[0])
    assert foldrank("compare", study, "--out", tmp_path / "out").code == 0
    more = write_study(tmp_path, text, methods=["cola"], seeds=[0, 1])
    (text / "0.txt").write_text("ba " * 300)
    done = foldrank("compare", more, "--out", tmp_path / "out")
    assert done.code == 2
    assert "the text of the corpus 'words' is not what it was" in done.stderr


def test_the_plan_says_what_it_costs_and_runs_nothing(
    undisturbed: tuple[Path, Path], foldrank: Foldrank, tmp_path: Path
) -> None:
    study, out = undisturbed
    plan = foldrank("compare", study, "--out", tmp_path / "out", "--plan", "--json").json["plan"]
    records = read_records(out)
    assert plan["runs"] == len(records)
    trained = [record.measured for record in records.values()]
    assert plan["tokens"] == sum(metrics.tokens for metrics in trained)
    assert plan["flops"] == sum(metrics.flops for metrics in trained)
    assert 0 < plan["minutes"] < 5
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "no study is called 'nothing': give a .yaml file, or one of tiny"),
        (["missing.yaml"], "missing.yaml cannot be read as a study"),
        (["tiny", "--workers", "0"], "--workers: must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, foldrank: Foldrank) -> None:
    done = foldrank("compare", *arguments)
    assert done.code == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_shipped_study_is_one(foldrank: Foldrank) -> None:
    plan = foldrank("compare", "tiny", "--plan", "--json").json["plan"]
    assert plan["runs"] == 18
    assert json.dumps(plan)


def test_records_from_before_a_setting_existed_are_of_its_default() -> None:
    study, folder = load_study(STUDIES / "dlr-tiny.yaml"), STUDIES / "dlr-tiny"
    assert any("chunked_loss" not in record.recipe["train"] for record in read_records(folder).values())
    check_records(study, folder)
    assert planned(study, read_records(folder)) == []
