"""Each example as a user runs it: a program of its own, warnings as errors."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
NEEDS = {"with_lightning": "lightning"}
IGNORED = {"with_lightning": ["-W", "ignore:`isinstance(treespec, LeafSpec)`:FutureWarning"]}  # of lightning's own code


@pytest.mark.parametrize("name", ["bare_loop", "with_trainer", "with_accelerate", "with_lightning"])
def test_converts_learns_folds_and_checks_the_fold(name: str, tmp_path: Path) -> None:
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed: pip install 'foldrank[examples]'")
    program = [sys.executable, "-W", "error", *IGNORED.get(name, []), str(FOLDER / f"{name}.py")]
    done = subprocess.run(program, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"converted \d+ of \d+ linear layers", done.stdout)
    losses = re.search(r"loss (\S+) -> (\S+)", done.stdout)
    assert losses is not None
    assert float(losses[2]) < float(losses[1]) - 1.0
    assert re.search(r"folded \d+ low-rank layers", done.stdout)
    change = re.search(r"largest change of a logit: (\S+)", done.stdout)
    assert change is not None
    assert float(change[1]) <= 1e-5
    assert not list(tmp_path.iterdir())
