"""What the tests of several processes share."""

from pathlib import Path

import pytest

from .runs import write_recipes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of which a run takes half a second."""
    return write_recipes(tmp_path_factory.mktemp("tiny"))
