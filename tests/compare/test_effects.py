"""What a study reports of methods whose difference is known beforehand, from the runs to the words of the report."""

from pathlib import Path
from typing import Any

import pytest

from foldrank.cli import main

from ..called import Foldrank
from .test_compare_command import write_study

METHODS = [
    {"name": "whole", "kind": "cola-dlr", "settings": {"low_rank.residual.expansion": "random"}},
    # The same method: run again, and with another draw of what is random in it.
    {"name": "again", "kind": "cola-dlr", "settings": {"low_rank.residual.expansion": "random"}, "against": ["whole"]},
    {
        "name": "redrawn",
        "kind": "cola-dlr",
        "settings": {"low_rank.residual.expansion": "random", "low_rank.residual.seed": 1},
        "against": ["whole"],
    },
    # The planted effect: a handicap.
    {
        "name": "hurt",
        "kind": "cola-dlr",
        "settings": {"low_rank.residual.expansion": "random", "train.steps": 4},
        "against": ["whole"],
    },
]


@pytest.fixture(scope="module")
def study(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("effects")
    sweep = {"learning_rates": [0.01], "extend": 0}
    file = write_study(folder, corpus, methods=METHODS, sweep=sweep, seeds=[0, 1, 2])
    assert main(["compare", str(file), "--out", str(folder / "out")]) == 0
    return folder / "out"


@pytest.fixture
def differences(study: Path, foldrank: Foldrank) -> dict[str, Any]:
    (table,) = foldrank("report", study, "--json").json["tables"]
    found = {row["method"]: {other["method"]: other["difference"] for other in row["against"]} for row in table["rows"]}
    return {name: found[name]["whole"] for name in ("again", "redrawn", "hurt")}


def test_a_handicap_is_found(differences: dict[str, Any]) -> None:
    hurt = differences["hurt"]
    assert hurt["verdict"] == "higher"
    assert hurt["estimate"]["ci_low"] > 0
    assert hurt["estimate"]["seeds"] == 3


def test_a_method_against_itself_shows_no_difference(differences: dict[str, Any]) -> None:
    again, redrawn = differences["again"], differences["redrawn"]
    assert (again["verdict"], again["estimate"]["mean"], again["estimate"]["sd"]) == ("no difference shown", 0.0, 0.0)
    assert redrawn["verdict"] == "no difference shown"
    assert redrawn["estimate"]["sd"] > 0


def test_the_report_says_so_in_words(study: Path, foldrank: Foldrank) -> None:
    said = foldrank("report", study).stdout
    assert "again is not shown different from whole (" in said
    page = (study / "report.md").read_text()
    for sentence in (
        "again is not shown different from whole (",
        "redrawn is not shown different from whole (",
        "hurt is worse than whole: its test loss is higher (",
    ):
        assert sentence in page
