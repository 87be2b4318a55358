"""Successive halving: which rates stop where, and that a run which goes on is the run that never stopped."""

import math
from pathlib import Path
from typing import Any

import pytest

from foldrank.cli import main
from foldrank.compare.analysis import analyse
from foldrank.compare.cost import cost
from foldrank.compare.learning_rate_sweep import best_at_boundary
from foldrank.compare.plan import choice, expected, planned, stopped_folders, total
from foldrank.compare.records import Record, read_records
from foldrank.compare.report import report_html
from foldrank.compare.study_file import load_study

from .studies import metrics_of
from .test_compare_command import write_study
from .test_plan import study_of

RATES = [0.01, 0.02, 0.04, 0.08, 0.16]


def run_all(study: Any, loss: Any) -> dict[str, Record]:
    """Records of all sweeps, with the loss that a function of rate and step says; None: the run fails there."""
    records: dict[str, Record] = {}
    while todo := [run for run in planned(study, records) if run.stage != "final"]:
        for run in todo:
            value = loss(run.learning_rate, run.until)
            named = ("id", "corpus", "size", "method", "stage", "learning_rate", "seed", "until")
            facts: dict[str, Any] = {name: getattr(run, name) for name in named}
            if value is None:
                facts["error"] = "ValueError: it is nan"
            elif run.stage == "rung":
                facts["val_loss"] = value
            else:
                facts["metrics"] = metrics_of(val_loss_folded=value)
            records[run.id] = Record(**facts)
    return records


def halved(tmp_path: Path, **sweep: Any) -> Any:
    sweep = {"learning_rates": RATES, "seeds": [7, 8], "extend": 1, "steps": 100, "halve_at": [0.25, 0.5], **sweep}
    return study_of(tmp_path, methods=["cola"], sweep=sweep)


def test_the_worse_half_stops_at_each_step(tmp_path: Path):
    study = halved(tmp_path)
    records = run_all(study, lambda rate, _: math.log(rate / 0.03) ** 2)
    found = choice(study, records, "stdlib", "tiny", study.method("cola"))
    assert found.stopped == {0.01: 25, 0.16: 25, 0.08: 50}
    assert (found.rates, found.best, found.best_at_boundary) == ([0.02, 0.04], 0.04, False)
    steps = [run.until for run in expected(study, records) if run.stage != "final"]
    assert [steps.count(step) for step in (25, 50, None)] == [2 * 5, 2 * 3, 2 * 2]
    assert len(stopped_folders(study, records)) == 3 * 2
    assert total(study) == 2 * 2 + 3


def test_what_looks_best_early_need_not_be_chosen(tmp_path: Path):
    study = halved(tmp_path, halve_at=[0.5])
    by_step = {50: {0.01: 5, 0.02: 4, 0.04: 3, 0.08: 2, 0.16: 1}, None: {0.04: 1, 0.08: 2, 0.16: 3}}
    records = run_all(study, lambda rate, until: by_step[until][rate])
    assert choice(study, records, "stdlib", "tiny", study.method("cola")).best == 0.04


def test_a_best_rate_at_the_end_of_the_series_is_extended_by_whole_runs(tmp_path: Path):
    study = halved(tmp_path)
    records = run_all(study, lambda rate, _: -rate)
    found = choice(study, records, "stdlib", "tiny", study.method("cola"))
    assert (found.rates, found.best, found.best_at_boundary) == ([0.08, 0.16, 0.32], 0.32, True)
    assert {run.until for run in expected(study, records) if run.learning_rate == 0.32} == {None}


def test_the_last_of_two_rates_is_the_smallest_and_not_the_only_one(tmp_path: Path):
    study = halved(tmp_path, learning_rates=[0.01, 0.02], extend=0, halve_at=[0.001])
    records = run_all(study, lambda rate, _: rate)
    assert {run.until for run in expected(study, records) if run.stage == "rung"} == {1}
    assert best_at_boundary(study, records, "stdlib", "tiny", study.method("cola")) == "the smallest tried"


def test_what_fails_early_stops_and_where_all_fail_nothing_is_chosen(tmp_path: Path):
    study = halved(tmp_path)
    records = run_all(study, lambda rate, _: None if rate > 0.02 else rate)
    assert choice(study, records, "stdlib", "tiny", study.method("cola")).best == 0.005
    nothing = run_all(study, lambda *_: None)
    assert choice(study, nothing, "stdlib", "tiny", study.method("cola")).best is None
    assert not planned(study, nothing)


@pytest.mark.parametrize("halve_at", [[0.0], [0.5, 0.25], [0.5, 1.0]])
def test_shares_that_make_no_sense_are_one_line(tmp_path: Path, halve_at: list[float]):
    with pytest.raises(ValueError, match="halve_at must be growing shares between 0 and 1"):
        halved(tmp_path, halve_at=halve_at)


@pytest.mark.parametrize("setting", ["train.learning_rate", "seed"])
def test_what_a_study_decides_itself_is_no_setting(tmp_path: Path, setting: str):
    grid = {"name": "cola", "grid": {setting: [1, 2]}}
    for changes in (
        {"settings": {setting: 1}},
        {"methods": [grid]},
        {"sizes": {"a": {"rank": 4, "settings": {setting: 1}}}},
    ):
        with pytest.raises(ValueError, match=f"{setting} is no setting of a study: "):
            study_of(tmp_path, **changes)


def test_the_cost_counts_what_is_not_trained(tmp_path: Path):
    plain, early = (halved(tmp_path, halve_at=at, seeds=[7]) for at in ([], [0.25, 0.5]))
    per_step = 16 * 128
    finals = 3 * 300 * per_step
    assert cost(plain)["tokens"] - finals == 5 * 100 * per_step
    assert cost(early)["tokens"] - finals == (5 * 25 + 3 * 25 + 2 * 50) * per_step


def test_a_run_that_goes_on_is_the_run_that_never_stopped(corpus: Path, tmp_path: Path):
    sweep = {"learning_rates": [0.005, 0.01, 0.02], "extend": 0}
    outs = {}
    for name, halve_at in (("plain", []), ("early", [0.4])):
        (tmp_path / name).mkdir()
        file = write_study(tmp_path / name, corpus, methods=["cola"], seeds=[0], sweep={**sweep, "halve_at": halve_at})
        outs[name] = tmp_path / name / "out"
        assert main(["compare", str(file), "--out", str(outs[name])]) == 0
    plain, early = (read_records(out) for out in outs.values())
    rungs = {name: record for name, record in early.items() if record.stage == "rung"}
    assert [record.until for record in rungs.values()] == [4, 4, 4]
    (stopped,) = (name for name in plain if name not in early)
    assert not (outs["early"] / "runs" / stopped).exists()
    for name in early.keys() - rungs.keys():
        # The pause is one more point of the history, and all else is the same.
        ours, theirs = early[name].measured, plain[name].measured
        assert (ours.val_loss, ours.val_loss_folded, ours.test_loss) == (
            theirs.val_loss,
            theirs.val_loss_folded,
            theirs.test_loss,
        )
        assert ours.history[-1].val_loss == theirs.history[-1].val_loss
    study = load_study(outs["early"] / "study.yaml")
    analysis = analyse(study, early)
    assert (analysis.orphaned_records, analysis.failures) == ((), ())
    (row,) = analysis.tables[0].rows
    assert [rate.stopped_at for rate in row.rates].count(4) == 1
    assert "stopped at step 4" in report_html(analysis)
    # Killed after the loss was logged and before the record was written: the log is believed.
    name = next(name for name in rungs if name.removesuffix("-step4") != stopped)
    (outs["early"] / "records" / f"{name}.json").unlink()
    assert main(["compare", str(outs["early"] / "study.yaml"), "--out", str(outs["early"])]) == 0
    assert read_records(outs["early"])[name].val_loss == rungs[name].val_loss
