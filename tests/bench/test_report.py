"""Records, and the tables that are made of them alone."""

import json
import shutil
from pathlib import Path

import pytest

from foldrank.bench.record import read_records
from foldrank.bench.report import BEGIN, END, update

from ..called import Foldrank

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_committed_tables_are_those_of_the_committed_records(tmp_path: Path) -> None:
    shutil.copytree(BENCHMARKS, tmp_path / "benchmarks")
    page = tmp_path / "benchmarks" / "README.md"
    update(page)
    assert page.read_text() == (BENCHMARKS / "README.md").read_text()


@pytest.fixture
def page(foldrank: Foldrank, recipe_file: Path, tmp_path: Path) -> Path:
    """A page beside two records that were measured, and one of another program."""
    command = ("bench", "layer", "--recipe", recipe_file, "--rounds", 2, "--methods", "cola", "cola-dlr")
    for number in (1, 2):
        found = foldrank(*command, "--out", tmp_path / "records", "--json").json
        file = Path(found.pop("file"))
        assert file.name.startswith("layer-small-cpu-")
        assert file.name.endswith(f"-{number}.json")
        assert json.loads(file.read_text()) == found
    (tmp_path / "records" / "residual_step-2026-11-22-a.json").write_text("{}")
    page = tmp_path / "README.md"
    page.write_text(f"before\n\n{BEGIN}\nthe tables before\n{END}\n\nafter\n")
    return page


def test_tables_stand_between_the_marks(foldrank: Foldrank, page: Path) -> None:
    done = foldrank("bench", "--report", page)
    assert (done.code, done.stdout) == (0, f"wrote the tables of 2 records into {page}\n")
    text = page.read_text()
    assert text.startswith(f"before\n\n{BEGIN}\n\n### layer: ")
    assert text.endswith(f"\n{END}\n\nafter\n")
    assert "the tables before" not in text
    record = next(iter(read_records(page.parent / "records").values()))
    low, median, high = record.cases["32 to 50"]["cola-dlr"]["ratio"]
    assert f"| 32 to 50: cola-dlr | {median:.3f} ({low:.3f} to {high:.3f}) |" in text
    update(page)
    assert page.read_text() == text


def test_a_record_tells_promise_profile_and_note(foldrank: Foldrank, recipe_file: Path, tmp_path: Path) -> None:
    command = ("bench", "step", "--recipe", recipe_file, "--layers", 1, "--rounds", 2, "--methods", "dense", "cola")
    foldrank(*command, "--profile", "--note", "seen in a test", "--out", tmp_path / "records")
    page = tmp_path / "README.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    update(page)
    (record,) = read_records(tmp_path / "records").values()
    dense, cola = record.cases["step"]["dense"], record.cases["step"]["cola"]
    speed, limit = 1 / cola["ratio"][1], dense["flops_per_token"] / cola["flops_per_token"]
    assert limit > 1
    text = page.read_text()
    assert f"| {speed:.2f} | {limit:.2f} | {speed / limit:.2f} |" in text
    assert "\nseen in a test\n" in text
    for figures in (dense, cola):
        operators = figures["profile"]["operators"]
        assert {"aten::mm"} <= {operator["name"] for operator in operators}
        spent = [operator["seconds"] for operator in operators]
        assert spent == sorted(spent, reverse=True)
        assert 0 < sum(spent) <= figures["profile"]["seconds"]
    assert "| cola | aten::mm | " in text


def test_what_is_no_record_or_no_page_is_said(foldrank: Foldrank, page: Path) -> None:
    file = page.parent / "records" / "step-broken.json"
    for content in ("{", "[]", '{"schema": 0}', '{"schema": 1, "cases": {}}'):
        file.write_text(content)
        done = foldrank("bench", "--report", page)
        assert done.code == 2
        assert f"{file} is no record of a benchmark" in done.stderr
    file.unlink()
    page.write_text(f"{END} {BEGIN}")
    done = foldrank("bench", "--report", page)
    assert done.code == 2
    assert "has no place for the tables" in done.stderr
