"""The notebooks: run whole at small size, and shown as they are."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.apart


def test_the_notebooks_shown_are_those_that_are_run() -> None:
    import jupytext

    def sources(notebook: Any) -> list[tuple[str, str]]:
        return [(cell["cell_type"], cell["source"]) for cell in notebook.cells]

    texts = sorted((ROOT / "docs" / "notebooks").glob("*.py"))
    assert len(texts) == 3
    for text in texts:
        shown = jupytext.read(text.with_suffix(".ipynb"))
        assert sources(shown) == sources(jupytext.read(text)), f"make notebooks: {text.name} has changed"
        outputs = [output for cell in shown.cells for output in cell.get("outputs", ())]
        assert any("image/png" in output.get("data", {}) for output in outputs), text.name
        assert not [output for output in outputs if output["output_type"] == "error"]


@pytest.mark.parametrize("name", ["ten-minutes", "module-of-your-own", "fine-tune-and-export"])
def test_a_notebook_runs_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "8")
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'docs/_ext'); from notebooks import execute;"
        "execute(Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, f"docs/notebooks/{name}.py"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
