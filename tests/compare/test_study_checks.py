"""A study that cannot be run rightly is refused at its door; a folder that is no study's is left alone."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foldrank.compare import worker
from foldrank.compare.analysis import analyse
from foldrank.compare.formatting import perplexity
from foldrank.compare.records import read_records
from foldrank.compare.study import Size, StudyMethod
from foldrank.compare.study_file import WRITTEN_BY_US, check_folder, load_study
from foldrank.recipes.schema import Recipe
from foldrank.train.metrics import RunMetrics

from ..called import Foldrank, tree
from .studies import by_id, final_runs, planted, study_of, sweep_runs


def test_flops_of_in_a_circle_is_one_line() -> None:
    a, b = (StudyMethod(name=one, kind="cola", flops_of=other) for one, other in (("a", "b"), ("b", "a")))
    with pytest.raises(ValueError, match="flops_of goes in a circle: a -> b -> a"):
        study_of("dense", a, b)
    with pytest.raises(ValueError, match="flops_of goes in a circle: c -> c"):
        study_of(StudyMethod(name="c", kind="cola", flops_of="c"))


def test_equal_flops_count_what_activation_checkpointing_computes_again() -> None:
    again = {"train.activation_checkpointing": "block"}
    study = study_of("cola", StudyMethod(name="again", kind="cola", settings=again, flops_of="cola"))
    plain, less = (study.recipe("stdlib", "tiny", study.method(name)) for name in ("cola", "again"))
    assert less.train.steps < 0.9 * plain.train.steps


@pytest.mark.parametrize("name", ["a/b", "..\\x", "a b", "", "a:b", "x\0"])
def test_names_that_are_no_names_of_files_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no name"):
        study_of(StudyMethod(name=name, kind="cola"))
    with pytest.raises(ValueError, match="is no name of a corpus or size"):
        study_of("dense", corpora={name: {}})
    with pytest.raises(ValueError, match="is no name of a corpus or size"):
        study_of("dense", sizes={name: Size(rank=4)})


def test_two_settings_that_would_share_the_name_of_a_run_are_refused() -> None:
    with pytest.raises(ValueError, match="two pairs of corpus and size are both called 'a-b-c'"):
        study_of("dense", corpora={"a-b": {}, "a": {}}, sizes={"c": Size(rank=4), "b-c": Size(rank=4)})


def test_a_perplexity_that_no_float_holds_is_still_a_report() -> None:
    study = study_of("dense", "cola", seeds=(0, 1))
    loss = planted({"dense": 0.0, "cola": 0.1})
    records = [*sweep_runs(study), *final_runs(study, loss)]
    bad = next(index for index, record in enumerate(records) if (record.method, record.stage) == ("cola", "final"))
    records[bad] = replace(records[bad], metrics=replace(records[bad].measured, test_loss=120.0))
    from foldrank.compare.report import report_markdown

    assert "cola" in report_markdown(analyse(study, by_id(records)))
    assert perplexity(math.log(50.0)) == "50.00"
    assert (perplexity(120.0), perplexity(1000.0)) == ("1.30e+52", "inf")


STUDY = """\
title: small
base: tiny-dense
settings: {{train.steps: 2, train.batch_size: 2, train.sequence_length: 32, train.eval_every: 2,
           train.eval_tokens: 300, train.test_tokens: 300, data.source: {corpus}, data.vocab_size: 300,
           data.validation_fraction: 0.2}}
sizes: {{tiny: {{rank: 4, settings: {{model.hidden_size: 16, model.intermediate_size: 24, model.num_layers: 1,
        model.num_heads: 2}}}}}}
sweep: {{learning_rates: [0.003], extend: 0}}
seeds: [0]
methods: [dense]
"""


@pytest.fixture
def study_file(corpus: Path, tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(STUDY.format(corpus=corpus))
    return file


def test_a_folder_that_is_no_study_s_is_left_alone(foldrank: Foldrank, study_file: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "texts", tmp_path / "mine"):
        folder.mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    (tmp_path / "mine" / "study.yaml").write_text("# who asked, and why\n" + study_file.read_text())
    (tmp_path / "file").write_text("")
    for out, study in (("texts", study_file), ("mine", tmp_path / "mine" / "study.yaml"), ("file", study_file)):
        before = tree(tmp_path)
        done = foldrank("compare", study, "--out", tmp_path / out)
        assert (done.code, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "choose another folder with --out" in done.stderr
        assert tree(tmp_path) == before


def test_a_study_goes_on_in_the_folder_that_it_made(foldrank: Foldrank, study_file: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert foldrank("compare", study_file, "--out", tmp_path / "out").code == 0
    written = tmp_path / "out" / "study.yaml"
    assert written.read_text().startswith(WRITTEN_BY_US)
    check_folder(tmp_path / "out", study_file)
    assert load_study(written).to_yaml() == load_study(study_file).to_yaml()


@pytest.mark.parametrize("passing", [RuntimeError("CUDA out of memory"), MemoryError()])
def test_what_may_pass_is_no_result_and_is_tried_again(
    passing: Exception, foldrank: Foldrank, study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really: Callable[..., RunMetrics] = worker.pretrain
    calls: list[Path] = []

    def first_fails(recipe: Recipe, out: Path, **others: Any) -> RunMetrics:
        calls.append(out)
        if len(calls) == 1:
            raise passing
        return really(recipe, out, **others)

    monkeypatch.setattr(worker, "pretrain", first_fails)
    out = tmp_path / "out"
    once = foldrank("compare", study_file, "--out", out)
    assert "the same command tries it again" in once.stderr
    assert read_records(out) == {}
    assert foldrank("compare", study_file, "--out", out).code == 0
    assert [record.finished for record in read_records(out).values()] == [True, True]
