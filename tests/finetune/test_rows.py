"""Examples of files, data sets and shipped tasks, parted into training and held out; what is none is refused."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from foldrank.finetune.rows import read_rows
from foldrank.finetune.settings import FinetuneSettings, setting_help

from .examples import labelled, prompts, write


def test_a_file_is_parted_the_same_way_each_time_and_nothing_is_lost(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", prompts())
    settings = FinetuneSettings(data=str(file), held_out_fraction=0.25)
    rows = read_rows(settings)
    assert 0 < len(rows.held_out) < 20
    assert sorted(map(str, (*rows.training, *rows.held_out))) == sorted(map(str, prompts()))
    assert rows == read_rows(settings)
    fewer = read_rows(replace(settings, max_examples=5))
    assert fewer.training == rows.training[:5]
    assert fewer.held_out == rows.held_out
    assert fewer.sha256 != rows.sha256


def test_examples_that_occur_twice_fall_on_one_side(tmp_path: Path) -> None:
    rows = read_rows(FinetuneSettings(data=str(write(tmp_path / "a.jsonl", [*prompts(), *prompts()]))))
    assert not {json.dumps(row) for row in rows.training} & {json.dumps(row) for row in rows.held_out}


def test_a_file_of_held_out_examples_is_never_trained_on(tmp_path: Path) -> None:
    held_out = write(tmp_path / "b.jsonl", prompts()[:7])
    rows = read_rows(FinetuneSettings(data=str(write(tmp_path / "a.jsonl", prompts())), held_out=str(held_out)))
    assert rows.held_out == prompts()[:7]
    assert sorted(map(str, rows.training)) == sorted(map(str, prompts()[7:]))


@pytest.mark.parametrize("ending", ["json", "jsonl.gz", "parquet", "csv"])
def test_other_files_hold_the_same_examples(tmp_path: Path, ending: str) -> None:
    file, rows = tmp_path / f"a.{ending}", labelled()
    if ending == "json":
        file.write_text(json.dumps(rows, indent=1))
    elif ending == "jsonl.gz":
        file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        table = datasets.Dataset.from_list(rows)
        table.to_parquet(file) if ending == "parquet" else table.to_csv(file)
    plain = read_rows(FinetuneSettings(data=str(write(tmp_path / "b.jsonl", rows))))
    assert read_rows(FinetuneSettings(data=str(file))) == plain


def test_a_data_set_on_disk_has_its_own_validation_split_and_names_of_labels(tmp_path: Path) -> None:
    """In the format of GLUE's tasks."""
    features = datasets.Features(
        sentence=datasets.Value("string"),
        label=datasets.ClassLabel(names=["wrong", "right"]),
        idx=datasets.Value("int32"),
    )
    for split, count in (("train", 30), ("validation", 6)):
        rows = [{"sentence": f"star {number}", "label": number % 2, "idx": number} for number in range(count)]
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "set" / f"{split}.parquet")
    rows = read_rows(FinetuneSettings(data=str(tmp_path / "set"), task="classification"))
    assert (len(rows.training), len(rows.held_out), rows.label_names) == (30, 6, ("wrong", "right"))


def test_the_shipped_tasks_hold_out_whole_files_or_are_balanced() -> None:
    rows = read_rows(FinetuneSettings(data="stdlib-packages", task="classification"))
    everything = [*rows.training, *rows.held_out]
    counts = {label: sum(row["label"] == label for row in everything) for label in {row["label"] for row in everything}}
    assert len(counts) == 6
    assert len(set(counts.values())) == 1
    summaries = read_rows(FinetuneSettings(data="stdlib-summaries"))
    assert len(summaries.training) > 10 * 100
    assert all(set(row) == {"prompt", "completion"} for row in summaries.training)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "nowhere"}, "no such data: 'nowhere' is no file, no data set"),
        ({"data": "glue/stsb", "task": "classification"}, "'glue/stsb' is no task of GLUE with labels"),
        ({"data": "stdlib-packages"}, "stdlib-packages is a task of classification, and task is language"),
        ({"data": "EMPTY"}, "has no training examples"),
        ({"data": "BAD"}, "holds lines that are no examples"),
        ({"data": "TEXT"}, "is no file of examples: those end in"),
        ({"data": "GOOD", "held_out": "nowhere.jsonl"}, "held_out is 'nowhere.jsonl', which is no file"),
    ],
)
def test_what_is_no_data_is_refused(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    files = {"EMPTY": "e.jsonl", "BAD": "b.jsonl", "TEXT": "t.txt", "GOOD": "g.jsonl"}
    (tmp_path / "e.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts(400)) + "[1]\n")
    (tmp_path / "t.txt").write_text("text")
    write(tmp_path / "g.jsonl", prompts())
    settings = {
        **settings,
        "data": str(tmp_path / files[settings["data"]]) if settings["data"] in files else settings["data"],
    }
    with pytest.raises(ValueError, match=message):
        read_rows(FinetuneSettings.from_dict(settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "x", "epochs": 0}, "epochs must be a number above 0, got 0"),
        ({"data": "x", "epochs": "3"}, "epochs: should be a number, got '3'"),
        ({"data": "x", "batch_size": True}, "batch_size: should be a number, got True"),
        ({"data": "x", "learning_rat": 1}, "there is no setting 'learning_rat'"),
        ({"data": "x", "task": "chat"}, "task: Input should be"),
        ({}, "data is missing"),
        ({"data": ""}, "data is empty"),
        ({"data": "x", "lora_rank": 4, "optimizer": "muon"}, "lora_rank trains adapters by adamw"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneSettings.from_dict(settings)


def test_each_setting_says_what_it_means() -> None:
    assert all(setting_help().values())
    assert FinetuneSettings.from_dict(FinetuneSettings(data="x").to_dict()) == FinetuneSettings(data="x")
