"""Fine-tuning as a stage of a study: the same seeds and examples for all methods, its figures in records and report."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foldrank.compare.analysis import analyse_folder
from foldrank.compare.records import read_records, write_record
from foldrank.compare.study import Study

from ..called import Foldrank
from ..finetune.examples import labelled, prompts, write
from .studies import study_of
from .test_compare_command import write_study


def of_small_files(folder: Path) -> dict[str, dict[str, Any]]:
    small = {"batch_size": 8, "learning_rate": 0.01, "held_out_fraction": 0.25}
    return {
        "answers": {"data": str(write(folder / "a.jsonl", prompts())), "epochs": 1, **small},
        "labels": {"data": str(write(folder / "b.jsonl", labelled())), "task": "classification", "epochs": 3, **small},
    }


def test_a_study_fine_tunes_what_it_compares_and_reports_it(corpus: Path, tmp_path: Path, foldrank: Foldrank) -> None:
    tasks = of_small_files(tmp_path)
    file = write_study(tmp_path, corpus, finetune=tasks, sweep={"learning_rates": [0.01], "extend": 0})
    out = tmp_path / "study"
    assert foldrank("compare", file, "--out", out).code == 0
    records = read_records(out)
    finals = [record for record in records.values() if record.stage == "final"]
    assert len(finals) == 4
    for record in records.values():
        assert set(record.finetuned) == (set(tasks) if record.stage == "final" else set())
    for record in finals:
        assert record.finetuned["answers"]["seed"] == record.seed
        assert record.finetuned["answers"]["after"]["loss"] < record.finetuned["answers"]["before"]["loss"]
        assert record.finetuned["labels"]["data_sha256"] == finals[0].finetuned["labels"]["data_sha256"]
    assert not list((out / "runs").glob("*/finetuned-*"))

    (table,) = analyse_folder(out).tables
    assert [(each.task, each.method) for each in table.transfers] == [
        ("answers", "cola"),
        ("answers", "cola-dlr"),
        ("labels", "cola"),
        ("labels", "cola-dlr"),
    ]
    labels = table.transfers[3]
    values = {record.seed: record.finetuned["labels"]["after"] for record in finals if record.method == "cola-dlr"}
    assert labels.after.mean == pytest.approx(sum(each["loss"] for each in values.values()) / 2)
    assert labels.accuracy is not None
    assert labels.accuracy.mean == pytest.approx(sum(each["accuracy"] for each in values.values()) / 2)
    (against,) = labels.against
    assert (against.method, against.difference.estimate is not None) == ("cola", True)
    assert foldrank("report", out).code == 0
    text = (out / "report.md").read_text()
    assert "After fine-tuning" in text
    assert "| labels | cola-dlr | 2 |" in text.replace("  ", " ")

    # What a killed process had finished of a run is not run again.
    name = next(record.id for record in finals if record.method == "cola")
    one = records[name]
    failed = {**one.finetuned, "answers": {"error": "ValueError: the loss is nan at step 3"}}
    write_record(out, replace(one, finetuned=failed))
    analysis = analyse_folder(out)
    (failure,) = analysis.failures
    assert (failure.id, failure.stage) == (name, "fine-tuned: answers")
    assert [len(each.records) for each in analysis.tables[0].transfers] == [1, 2, 2, 2]
    assert foldrank("report", out).code == 0
    assert "the loss is nan at step 3" in (out / "report.md").read_text()
    assert json.loads((out / "records" / f"{name}.json").read_text())["finetuned"].keys() == tasks.keys()
    write_record(out, replace(one, finetuned={}))
    refused = foldrank("compare", file, "--out", out)
    assert refused.code == 2
    assert "is without the fine-tuning 'answers'" in refused.stderr
    shutil.rmtree(out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "x", "epoch": 1}, "finetune.chat: there is no setting 'epoch'"),
        ({"epochs": 1}, "finetune.chat: data is missing"),
        ({"data": "x", "seed": 3}, "finetune.chat: the seed is the run's"),
    ],
)
def test_a_fine_tuning_that_cannot_be_is_refused_with_the_study(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study_of("cola", finetune={"chat": settings})
    assert isinstance(study_of("cola", finetune={"chat": {"data": "x"}}), Study)
