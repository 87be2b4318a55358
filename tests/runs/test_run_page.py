"""The page of a run, its size and its time; and a run on the screen."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foldrank.recipes import load_recipe
from foldrank.runs.page import document, write_page
from foldrank.runs.run import read_run
from foldrank.runs.watch import duration, screen, seconds_left, tokens_per_second
from foldrank.train.pretrain import pretrain

from ..called import Foldrank
from ..small_runs import Run
from .logs import BEGAN, entries, here, write_run

LONG = 150_000


def texts(folder: Path) -> str:
    return repr(document([read_run(folder)]))


def test_a_finished_run_has_its_page(finished_run: Run) -> None:
    page = (finished_run.out / "report.html").read_text()
    said = texts(finished_run.out)
    assert f"{finished_run.metrics['val_loss_folded']:.4f}" in page
    assert "The text" not in page
    for what in ("Effective rank, by layer", "Largest rounding of a weight, by layer", "Texts that it wrote"):
        assert what in page
    assert finished_run.metrics["text_sha256"] in page
    assert repr(finished_run.metrics["sample"])[1:-1] in said
    # In a checkpoint's block each layer has a rank of its own.
    assert set(finished_run.metrics["effective_ranks"]) == set(finished_run.metrics["fold_weight_rounding"])


def test_settings_that_differ_from_the_recipe_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", entries(10), steps=10)
    assert "train.steps was 300 and is 10" in texts(folder)
    mine = write_run(tmp_path / "mine", entries(10), recipe="mine", steps=10)
    assert "mine is no shipped recipe" in texts(mine)


def test_runs_are_laid_over_each_other_by_names_of_their_own(foldrank: Foldrank, tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / name, entries(50, every=10), steps=50) for name in ("one", "two"))
    done = foldrank("report", one, two, "--out", tmp_path / "pages", "--json")
    assert [run["step"] for run in done.json["runs"]] == [50, 50]
    page = Path(done.json["html"]).read_text()
    for name in (one, two):
        assert f"{name}: training" in page
    assert page.count("<h2") >= 5


def test_what_is_no_run_is_one_line(foldrank: Foldrank, tmp_path: Path) -> None:
    for command in ("report", "watch"):
        done = foldrank(command, tmp_path)
        assert (done.code, done.stdout) == (2, "")
        assert "is neither a run nor a study" in done.stderr
    (tmp_path / "config.yaml").write_text("a: 1\n")
    for command in ("report", "watch"):
        assert "holds no run" in foldrank(command, tmp_path).stderr


@pytest.mark.apart
def test_a_long_run_has_a_small_page_quickly_and_is_watched_at_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "long", entries(LONG, every=1000), steps=LONG)
    write_page([write_run(tmp_path / "short", entries(5), steps=5)], tmp_path / "first.html")  # what is imported once
    began = time.perf_counter()
    write_page([folder], tmp_path / "report.html")
    seconds = time.perf_counter() - began
    assert (tmp_path / "report.html").stat().st_size < 1_500_000
    assert seconds < 3

    measured = (
        "import re, sys; from foldrank.cli import main; code = main(['watch', sys.argv[1]]);"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); sys.exit(code)"
    )
    took, said = [], ""
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", measured, folder], capture_output=True, text=True, check=True)
        took.append(time.perf_counter() - began)
        said = done.stdout
    assert min(took) < 1.0
    assert int(said.splitlines()[-1]) < 200 * 1024
    assert f"step {LONG:,} of {LONG:,}" in said


def test_a_run_on_the_screen(tmp_path: Path) -> None:
    log = list(entries(100, every=50))
    log[0] |= here()
    run = read_run(write_run(tmp_path / "run", iter(log), steps=200))
    assert run.state == "running"
    shown = screen(run, 60)
    assert "step 100 of 200 (50%)" in shown
    assert "20,480 tokens/s, 10 s of training left" in shown
    assert "last evaluation, after step 100" in shown
    assert (tokens_per_second(run), seconds_left(run)) == pytest.approx((20480, 10.0))
    assert all(len(line) <= 60 for line in shown.splitlines()[3:])


def test_a_run_that_died_is_dead_and_says_how_to_go_on(foldrank: Foldrank, tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    log = list(entries(40))
    log[0] |= here(pid=gone.pid)
    folder = write_run(tmp_path / "run", iter(log), steps=200)
    watched = foldrank("watch", folder, "--json").json
    assert (watched["state"], watched["step"]) == ("dead", 40)
    assert watched["resume"] == f"foldrank pretrain {folder}/config.yaml --out {folder} --resume"
    assert watched["resume"] in watched["screen"]
    assert watched["resume"] in texts(folder)


def test_a_process_of_the_same_number_is_another_one(tmp_path: Path) -> None:
    log = list(entries(40))
    log[0] |= here(time=BEGAN - 1e9)  # long before this process began
    assert read_run(write_run(tmp_path / "run", iter(log), steps=200)).state == "dead"


def test_a_run_elsewhere_is_dead_once_it_is_silent(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", entries(40), steps=200))

    def spoke(seconds_ago: float) -> Any:
        last = time.time() - seconds_ago
        sessions = [run.log.sessions[0]._replace(time=last - 4)]
        return replace(run, log=replace(run.log, last_time=last, sessions=sessions))

    silent, spoken = spoke(700), spoke(5)
    assert (silent.state, spoken.state) == ("dead", "running")


def test_a_run_that_says_why_it_ended(tmp_path: Path) -> None:
    log = [*entries(40), {"step": 40, "event": "stopped", "message": "the disk is full", "time": BEGAN}]
    run = read_run(write_run(tmp_path / "run", iter(log), steps=200))
    assert run.state == "stopped"
    assert "ended early: the disk is full" in screen(run, 60)


def test_watching_disturbs_nothing(finished_run: Run, foldrank: Foldrank) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.out.rglob("*")}
    assert foldrank("watch", finished_run.out).code == 0
    assert {path: path.stat().st_mtime_ns for path in finished_run.out.rglob("*")} == before


def test_the_line_that_resumes_is_right(
    foldrank: Foldrank, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short: dict[str, Any] = {"train.save_every": 4, "train.eval_every": 4}
    pretrain(load_recipe(str(recipe_file), short), Path("a run"), name="small", quiet=True)
    os.remove("a run/metrics.json")
    run = read_run(Path("a run"))
    assert run.resume_line == "foldrank pretrain 'a run/config.yaml' --out 'a run' --resume"
    done = foldrank("pretrain", "a run/config.yaml", "--out", "a run", "--resume")
    assert done.code == 0, done.stderr
    events = [json.loads(line) for line in Path("a run/log.jsonl").read_text().splitlines() if "went on" in line]
    assert len(events) == 1
    assert "went on from a checkpoint" in Path("a run/report.html").read_text()


def test_durations() -> None:
    assert [duration(value) for value in (0.4, 59, 61, 3600, 90_000)] == [
        "0 s",
        "59 s",
        "1 min 1 s",
        "1 h 0 min",
        "1 d 1 h",
    ]
