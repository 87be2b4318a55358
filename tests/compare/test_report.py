"""The two reports as text, and the command that writes them."""

import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from foldrank.cli import main
from foldrank.compare.analysis import analyse
from foldrank.compare.report import report_html, report_markdown
from foldrank.compare.report.tables import sources

from .studies import by_id, failed, final_runs, large_study, planted, study_of, sweep_runs, write_study

VOID = {"meta", "link", "input", "br"}


class Outline(HTMLParser):
    """Elements, identifiers, what refers to them, and headings, of a page whose elements are all closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str | None] = []
        self.wanted: set[str] = set()
        self.headings: list[int] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.elements.append((tag, given))
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [given["id"]] if given.get("id") else []
        for name in ("aria-labelledby", "aria-describedby", "data-chart"):
            self.wanted |= {given[name] or ""} if name in given else set()
        if tag == "a":
            self.wanted.add((given["href"] or "").removeprefix("#"))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def large() -> tuple[str, str]:
    study, records = large_study()
    found = analyse(study, by_id(records))
    return report_html(found), report_markdown(found)


@pytest.fixture(scope="module")
def small_markdown() -> str:
    study = study_of("dense", "cola", "cola-dlr")
    loss = {"dense": 2.9, "cola": 3.0, "cola-dlr": 2.95}
    records = [
        *sweep_runs(study),
        *final_runs(study, lambda method, seed: loss[method] + 0.01 * seed * (method != "cola")),
    ]
    records[-1] = failed(records[-1], "RuntimeError: out | of memory")
    del records[9]  # dense, seed 0
    return report_markdown(analyse(study, by_id(records)))


def test_markdown_by_hand(small_markdown: str) -> None:
    lines = small_markdown.splitlines()
    assert lines[:5] == [
        "# Planted",
        "",
        "Is the planted difference found?",
        "",
        "**This study is not complete. Final runs: 14 of 15 done, 1 missing. Runs of the sweep: 9 done. All below is "
        "made from what is there.**",
    ]
    text = small_markdown.replace("\N{MINUS SIGN}", "-")
    lines = text.splitlines()
    # cola-dlr less cola: -0.05, -0.04, -0.03, -0.02; mean -0.035, sd 0.01291, t(0.975, 3) 3.18245, half 0.02054
    assert "| cola-dlr | cola | 4 | -0.0350 | -0.0555 to -0.0145 | 0.0129 | lower |" in lines
    assert (
        "- cola-dlr is better than cola: its test loss is lower (-0.0350, 95 % interval -0.0555 to -0.0145, 4 seeds)."
        in lines
    )
    # cola: 3.0 five times; exp(3) = 20.09
    assert (
        "| cola | 0.006 | 2.0 | 0.08 | 5 | 3.0500 | 3.0500 to 3.0500 | 3.0000 | 3.0000 to 3.0000 | 20.09 | "
        "20.09 to 20.09 | stdlib-tiny-cola-lr0.006-seed\\{0,1,2,3,4\\} |" in lines
    )
    assert any(line.startswith("| cola-dlr | 0.006 | 2.0 | 0.08 | 4, 1 failed | ") for line in lines)
    assert any(line.startswith("| dense | 0.006 | \N{EN DASH} | 0.05 | 4, 1 missing | ") for line in lines)
    assert any(line.endswith("| 0.006 | 4 | RuntimeError: out \\| of memory |") for line in lines)
    assert "- stdlib, tiny: dense, seeds 0" in lines


def test_every_row_of_markdown_has_the_cells_of_its_head(large: tuple[str, str]) -> None:
    _, text = large
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) > 25
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_both_say_the_same_numbers(large: tuple[str, str]) -> None:
    page, text = large
    cells = re.findall(r"<t[dh] [^>]*class=\"number\">([^<]*)</td>|<td class=\"number\">([^<]*)</td>", page)
    of_page = sorted(first or second for first, second in cells)
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    of_text, numeric = [], []
    for cells_of_row in rows:
        if all(re.fullmatch("-+:?", cell) for cell in cells_of_row):
            numeric = [cell.endswith(":") for cell in cells_of_row]
        elif len(numeric) == len(cells_of_row):
            of_text += [cell.strip() for cell, is_number in zip(cells_of_row, numeric, strict=True) if is_number]
    assert len(of_page) > 500
    assert set(of_page) <= set(of_text)


def test_the_page_is_well_formed_and_its_references_meet(large: tuple[str, str]) -> None:
    page, _ = large
    found = Outline(page)
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert found.wanted <= set(found.ids)
    assert found.headings[0] == 1
    assert found.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(found.headings, found.headings[1:], strict=False))
    assert {"header", "nav", "main", "footer"} <= {tag for tag, _ in found.elements}
    assert all(given.get("scope") in ("col", "row") for tag, given in found.elements if tag == "th")
    tags = [tag for tag, _ in found.elements]
    assert tags.count("caption") == tags.count("table") > 25


def test_the_page_names_no_other_file(large: tuple[str, str]) -> None:
    page, _ = large
    for tag, given in Outline(page).elements:
        for name in ("src", "href", "srcset", "data", "action"):
            assert (given.get(name) or "#").startswith(("#", "data:")), (tag, given)


def test_text_of_a_model_stays_text(large: tuple[str, str]) -> None:
    page, text = large
    assert "<script>alert(1)</script>" not in page
    assert "<img src=x" not in page
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt; ```` \N{REPLACEMENT CHARACTER}[31m ? |" in page
    assert "\n`````text\n</script><img src=x" in text  # a fence longer than what it holds


def test_records_are_named_so_that_a_shell_finds_them() -> None:
    names = [f"stdlib-tiny-cola-dlr-lr0.006-seed{seed}" for seed in (0, 1, 10, 11)]
    said = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {sources(names)}"], capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == names
    assert sources(names[:1]) == names[0]


def test_a_study_that_has_just_begun_has_a_report() -> None:
    found = analyse(study_of("dense", "cola-dlr"), {})
    assert "Final runs: 0 of 10 done, 10 missing" in report_markdown(found)
    assert Outline(report_html(found)).open == []


def test_the_command_writes_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = study_of("dense", "cola", "cola-dlr")
    records = [*sweep_runs(study), *final_runs(study, planted({"cola": 0.1}))]
    folder = write_study(tmp_path / "study", study, records[:-1])
    log = folder / "runs" / records[-1].id / "log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text(
        '{"step": 1, "loss": 7.5}\n{"step": 2, "loss": 7.25}\n{"step": 2, "eval_loss": 7.0}\n{"step": 3, "lo'
    )
    assert main(["report", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "14 of 15 final runs done" in said
    assert "The residual: cola-dlr is better than the same without it (" in said
    text = (folder / "report.md").read_text()
    assert f"| {records[-1].id} | 2 | 7.2500 |" in text
    assert (folder / "report.html").read_text().startswith("<!doctype html>")

    assert main(["report", str(folder), "--out", str(tmp_path / "elsewhere"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["final_records_done"] == 14
    assert Path(result["markdown"]).read_text() == text


def test_what_is_no_study_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is neither a run nor a study" in capsys.readouterr().err
    study = study_of("dense")
    folder = write_study(tmp_path / "study", study, sweep_runs(study))
    next((folder / "records").iterdir()).write_text("{}")
    assert main(["report", str(folder)]) == 2
    assert "is no record of a run" in capsys.readouterr().err
    assert not (folder / "report.html").exists()
