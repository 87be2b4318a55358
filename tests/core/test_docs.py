"""What the documentation shows is run."""

import doctest
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["any-model.md"])
def test_examples_of_the_page_are_true(page: str) -> None:
    result = doctest.testfile(str(DOCS / page), module_relative=False, encoding="utf-8")
    assert result.attempted > 10
    assert result.failed == 0


def test_the_tests_that_a_page_names_exist() -> None:
    page = (DOCS / "what-dlr-is.md").read_text()
    root = DOCS.parent
    files = {name: (root / name).read_text() for name in re.findall(r"`(tests/[\w/]+\.py)", page)}
    assert len(files) > 5
    for name, test in re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", page):
        assert f"def {test}(" in files[name]
    for test in re.findall(r"`(test_\w+)`", page):
        assert any(f"def {test}(" in text for text in files.values()), test
