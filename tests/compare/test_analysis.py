"""Tables of studies whose truth is known."""

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest

from foldrank.compare.analysis import Analysis, Row, Table, analyse
from foldrank.compare.records import Record
from foldrank.compare.study import Study, StudyMethod
from foldrank.compare.summary import summary

from .studies import BEST, RATES, by_id, failed, final_runs, large_study, planted, run, study_of, sweep_runs


def whole(study: Study, differences: Mapping[str, float], noise: float = 0.01) -> list[Record]:
    return [*sweep_runs(study), *final_runs(study, planted(differences, noise=noise))]


def only(analysis: Analysis) -> Table:
    (table,) = analysis.tables
    return table


def row(analysis: Analysis, name: str) -> Row:
    return next(row for row in only(analysis).rows if row.method == name)


def verdicts(analysis: Analysis) -> dict[tuple[str, str], str]:
    return {(row.method, pair.method): pair.difference.verdict for row in only(analysis).rows for pair in row.against}


def test_a_planted_difference_is_found_and_a_method_against_itself_is_not() -> None:
    study = study_of("dense", "cola", "cola-dlr", StudyMethod(name="again", kind="cola", against=("cola",)))
    records = whole(study, {"cola": 0.1, "again": 0.1, "cola-dlr": 0.06})
    found = analyse(study, by_id(records))
    assert verdicts(found) == {
        ("cola", "dense"): "higher",
        ("cola-dlr", "dense"): "higher",
        ("cola-dlr", "cola"): "lower",
        ("again", "cola"): "no difference shown",
    }
    (_, pair) = row(found, "cola-dlr").against
    losses = {(each.method, each.seed): each.measured.test_loss or 0.0 for each in records if each.stage == "final"}
    by_hand = [losses["cola-dlr", seed] - losses["cola", seed] for seed in study.seeds]
    assert pair.difference.estimate is not None
    assert pair.difference.estimate.mean == pytest.approx(sum(by_hand) / 5, rel=1e-12)
    assert (found.final_records_done, found.final_records_expected, found.sweeps_done) == (20, 20, 12)


def test_failed_and_missing_runs_are_told_and_in_no_mean() -> None:
    study = study_of("dense", "cola")
    records = by_id(whole(study, {"cola": 0.1}))
    finals = [name for name, record in records.items() if (record.method, record.stage) == ("cola", "final")]
    records[finals[1]] = failed(records[finals[1]], "ValueError: the loss is not finite")
    nan = records[finals[2]]
    records[finals[2]] = replace(nan, metrics=replace(nan.measured, test_loss=float("nan")))
    del records[finals[3]]
    losses_of = {name: record.metrics.test_loss or 0.0 for name, record in records.items() if record.metrics}
    found = analyse(study, records)
    cola = row(found, "cola")
    assert (cola.finished, cola.failed, cola.missing) == (2, 2, (3,))
    assert cola.records == (finals[0], finals[4])
    assert cola.test is not None
    assert cola.test.mean == pytest.approx(sum(losses_of[name] for name in cola.records) / 2)
    assert [failure.id for failure in found.failures] == finals[1:3]
    assert "not finite" in found.failures[0].error
    assert (found.final_records_done, found.final_records_expected) == (9, 10)
    json.dumps(found.to_dict(), allow_nan=False)


def test_with_one_seed_nothing_is_said() -> None:
    study = study_of("dense", "cola", "cola-dlr", seeds=(3,))
    found = analyse(study, by_id(whole(study, {"cola-dlr": -5.0})))
    assert set(verdicts(found).values()) == {"too few seeds"}
    assert found.comparisons == 0
    ((_, sentences),) = summary(found)
    assert not any("better" in sentence or "worse" in sentence for sentence in sentences)


def test_nothing_yet_and_a_sweep_alone() -> None:
    study = study_of("dense", "cola")
    assert analyse(study, {}).final_records_done == 0
    sweep = [record for record in sweep_runs(study) if record.method == "dense"]
    found = analyse(study, by_id(sweep[:-1]))
    assert row(found, "dense").learning_rate is None
    assert [rate.learning_rate for rate in row(found, "dense").rates] == list(RATES[:-1])
    found = analyse(study, by_id(sweep))
    assert row(found, "dense").learning_rate == BEST
    costs = row(found, "dense").costs
    assert costs is not None
    assert (costs.parameters, costs.tokens_per_second, costs.flops) == (2_000_000, None, None)


def test_a_rate_at_the_edge_is_flagged() -> None:
    study = study_of("dense")
    study = replace(study, sweep=replace(study.sweep, extend=0))
    losses = dict(zip(RATES, (3.3, 3.2, 3.1), strict=True))
    sweep = [run(study.methods[0], 1000, losses[rate], stage="sweep", rate=rate) for rate in RATES]
    found = row(analyse(study, by_id(sweep)), "dense")
    assert (found.learning_rate, found.best_at_boundary) == (RATES[-1], "the largest tried")
    assert row(analyse(study, by_id(whole(study, {}))), "dense").best_at_boundary is None


def test_final_runs_at_another_rate_are_left_out_and_counted() -> None:
    study = study_of("dense")
    other = run(study.methods[0], 0, 1.0, rate=0.1)
    found = row(analyse(study, by_id([*whole(study, {}), other])), "dense")
    assert (found.other_rate, found.finished) == (1, 5)
    assert found.test is not None
    assert found.test.mean > 2


def test_equal_flops_and_time_are_read_off_the_curves() -> None:
    # A run's loss falls on a straight line from +1.5 at half to +0.75 at three quarters. 60 % of dense's FLOPs are all
    # of cola's, and 80 % of its time.
    study = study_of("dense", "cola")
    found = only(analyse(study, by_id(final_and_sweep(study))))
    budgets = {budget.axis: budget for budget in found.budgets}
    assert set(budgets) == {"flops", "seconds"}  # the tokens are equal as they are
    for axis, value, fraction, left in (("flops", 7.2e11, 0.6, 1.2), ("seconds", 20.0, 0.8, 0.6)):
        dense, cola = budgets[axis].rows
        assert budgets[axis].value == pytest.approx(value)
        assert (dense.fraction, cola.fraction) == pytest.approx((fraction, 1.0))
        assert dense.loss is not None
        assert cola.loss is not None
        assert dense.loss.mean == pytest.approx(3.05 + left)
        assert cola.loss.mean == pytest.approx(3.05)
        assert cola.against[0].difference.estimate is not None
        assert cola.against[0].difference.estimate.mean == pytest.approx(-left)


def final_and_sweep(study: Study) -> list[Record]:
    return [*sweep_runs(study), *final_runs(study, lambda *_: 3.0)]


def test_a_resumed_run_has_no_time() -> None:
    study = study_of("dense", "cola")
    records = final_and_sweep(study)
    last = records[-1]
    history = [replace(point, seconds=None if point.step < 300 else point.seconds) for point in last.measured.history]
    records[-1] = replace(last, metrics=replace(last.measured, history=tuple(history)))
    found = only(analyse(study, by_id(records)))
    rows = {(budget.axis, entry.method): entry for budget in found.budgets for entry in budget.rows}
    assert last.id not in rows["seconds", "cola"].records
    assert last.id in rows["flops", "cola"].records
    assert [point.seconds is None for point in found.rows[1].curve] == [True, True, False, False]


def test_methods_of_another_group_stand_beside_those_compared_with_them() -> None:
    study, records = large_study()
    found = analyse(study, by_id(records))
    table = next(
        table for table in found.tables if (table.corpus, table.size, table.group) == ("stdlib", "tiny", "same cost")
    )
    assert [(row.method, row.reference, bool(row.against)) for row in table.rows] == [
        ("cola-dlr", True, False),
        ("dense-short", False, True),
    ]
    tokens = next(budget for budget in table.budgets if budget.axis == "tokens")
    assert tokens.value == 60_000
    short = next(row for row in tokens.rows if row.method == "dense-short")
    assert (short.matched, short.fraction) == ("cola", 1.0)
    # Each comparison is counted once, in its own table.
    tested = [
        (table.corpus, table.size, row.method, pair.method)
        for table in found.tables
        for row in table.rows
        for pair in row.against
    ]
    assert len(tested) == len(set(tested)) == 2 * 9


def test_a_control_is_not_counted_as_a_method_with_the_residual() -> None:
    ablation = StudyMethod(
        name="cola-scaled", kind="cola-dlr", settings={"train.ablation": "scaled"}, against=("cola",)
    )
    study = study_of("cola", "cola-dlr", ablation)
    found = analyse(study, by_id(whole(study, {"cola-dlr": -0.1, "cola-scaled": 0.1})))
    assert [row.dlr for row in only(found).rows] == [False, True, False]
    ((_, sentences),) = summary(found)
    assert len(sentences) == 1
    assert sentences[0].startswith("cola-dlr is better than cola: its test loss is lower (")


def test_summary_counts_and_says_each_verdict() -> None:
    study = study_of("dense", "lowrank", "lowrank-dlr", "cola", "cola-dlr")
    differences = {"lowrank": 0.1, "lowrank-dlr": 0.3, "cola": 0.1, "cola-dlr": -0.1}
    ((title, sentences),) = summary(analyse(study, by_id(whole(study, differences))))
    assert title == "stdlib, tiny"
    assert sentences[0] == "2 methods with DLR against the same kind without: 1 better, 1 worse."
    assert [sentence.partition(":")[0] for sentence in sentences[1:]] == [
        "lowrank-dlr is worse than dense",
        "lowrank-dlr is worse than lowrank",
        "cola-dlr is better than dense",
        "cola-dlr is better than cola",
    ]
    many = [StudyMethod(name=f"m{place}", kind="cola-dlr", group="many", against=("cola",)) for place in range(9)]
    study = study_of("cola", *many)
    found = summary(analyse(study, by_id(whole(study, {f"m{place}": 0.5 * (place % 2) for place in range(9)}))))
    (_, (count, *rest)) = next(entry for entry in found if entry[0] == "stdlib, tiny: many")
    assert count.startswith("9 methods with DLR against the same kind without: ")
    assert any(sentence.startswith("Against cola, worse: m1 (+0.") for sentence in rest)


def test_the_drift_is_the_largest_over_the_runs() -> None:
    study = study_of("cola", "cola-dlr")
    found = row(analyse(study, by_id(whole(study, {}))), "cola-dlr").drift
    assert found is not None
    assert next(iter(found.layers)).startswith("model.layers.0.")
    assert list(found.layers)[-1].startswith("model.layers.10.")
    assert found.layers["model.layers.0.self_attn.q_proj"] == pytest.approx(5e-8)
    assert found.logit == pytest.approx(5e-6)
    assert found.agreement == pytest.approx(0.996)


def test_spectra_come_in_the_order_of_the_layers() -> None:
    study = study_of("dense", "cola-dlr")
    found = only(analyse(study, by_id(whole(study, {})))).spectra
    assert [entry.layer.split(".")[2] for entry in found] == ["0"] * 4 + ["2"] * 4 + ["10"] * 4
    assert {entry.method: entry.size for entry in found} == {"dense": 64, "cola-dlr": 16}


def test_the_order_of_the_records_does_not_matter() -> None:
    study, records = large_study()
    forwards, backwards = by_id(records), by_id(records[::-1])
    first, second = analyse(study, forwards).to_dict(), analyse(study, backwards).to_dict()
    for found in (first, second):
        found["failures"] = sorted(failure["id"] for failure in found["failures"])
        for table in found["tables"]:
            for each in table["rows"]:
                each["costs"]["records"] = sorted(each["costs"]["records"])
    assert first == second


def test_records_that_the_study_does_not_name_are_in_no_table() -> None:
    study = study_of("dense")
    stranger = run(StudyMethod(name="cola"), 0, 1.0)
    found = analyse(study, by_id([*whole(study, {}), stranger]))
    assert found.orphaned_records == (stranger.id,)
    assert "cola" not in json.dumps(found.to_dict()["tables"])
