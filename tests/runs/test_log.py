"""A log read whole and at a glance: what a process left, what a power cut left, what somebody put there."""

import json
import math
import os
from itertools import chain
from pathlib import Path

import pytest

from foldrank.runs.charts import along_seconds, along_tokens
from foldrank.runs.log import Log, glance, read_log
from foldrank.runs.run import read_run
from foldrank.runs.thin import thin

from .logs import BEGAN, entries, write_run


def test_an_empty_folder_has_an_empty_log(tmp_path: Path) -> None:
    log = read_log(tmp_path / "log.jsonl")
    assert (log.points, log.step, log.stopped) == ([], 0, None)


def test_a_pipe_in_its_place_is_no_log(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log.jsonl")
    assert read_log(tmp_path / "log.jsonl") == glance(tmp_path / "log.jsonl") == Log()


def test_what_is_no_entry_is_passed_over(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", entries(20, every=10), steps=20)
    clean = read_log(folder / "log.jsonl")
    with (folder / "log.jsonl").open("ab") as log:
        log.write(
            b'\xff\xfe\n[]\n{"step": 1e999, "loss": 1}\n{"step": 21, "loss": NaN}\n{"step": 22, "loss": "</script>"}\n'
        )
        log.write(b'{"step": 23, "loss": true}\n\0\0\0\n{"step": 24, "lo')
    assert [point.step for point in read_log(folder / "log.jsonl").points] == [*range(1, 21)]
    assert read_log(folder / "log.jsonl").evaluations == clean.evaluations


def test_seconds_and_speed_go_on_over_a_restart(tmp_path: Path) -> None:
    first = [entry for entry in entries(20) if entry["step"] <= 10]
    again = {"step": 10, "event": "went on", "host": "other", "pid": 2, "time": BEGAN + 500, "steps": 20}
    again["tokens_per_step"] = 2048.0
    second = [{**entry, "seconds": (entry["step"] - 10) * 0.2} for entry in entries(20) if entry["step"] > 10]
    run = read_run(write_run(tmp_path / "run", chain(first, [again], second), steps=20))
    assert [session.step for session in run.log.sessions] == [0, 10]
    assert along_seconds(run, [10, 11, 20]) == pytest.approx([1.0, 1.2, 3.0])
    assert along_tokens(run, [20]) == [20 * 2048]
    speeds = {point.step: point.speed for point in run.log.points}
    assert (speeds[1], speeds[11]) == (None, None)  # the first entry of a process
    assert (speeds[10], speeds[20]) == pytest.approx((20480, 10240))


def test_a_glance_at_a_long_log_sees_its_course_its_end_and_its_last_evaluation(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", entries(30_000, every=700), steps=30_000)
    whole, some = read_log(folder / "log.jsonl"), glance(folder / "log.jsonl")
    assert not some.whole
    assert some.evaluations[-1].step == whole.evaluations[-1].step
    assert (some.step, some.sessions, some.steps) == (30_000, whole.sessions, 30_000)
    assert len(some.points) < 2000
    assert set(some.points) - set(whole.points[1:]) <= {
        point._replace(speed=speed) for point, speed in zip(some.points, (p.speed for p in some.points), strict=True)
    }
    by_step = {point.step: point.loss for point in whole.points}
    assert all(by_step[point.step] == point.loss for point in some.points)


def test_thinning_keeps_what_stands_out() -> None:
    y = [math.sin(x / 1000) for x in range(100_001)]
    y[54_321] = 40.0
    short = thin(range(100_001), y)
    assert len(short.x) <= 500
    assert (max(short.highest), short.x[-1]) == (40.0, 100_000)
    assert sum(short.mean) / len(short.mean) == pytest.approx(sum(y) / len(y), abs=0.01)


def test_entries_are_what_a_run_writes(finished_run: object) -> None:
    out: Path = finished_run.out  # type: ignore[attr-defined]
    real = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    made = list(entries(4, every=2))
    for kind in ("loss", "event", "eval_loss"):
        ours, theirs = (next(entry for entry in log if kind in entry) for log in (made, real))
        assert ours.keys() <= theirs.keys()
