"""The notebooks: kept as text, run whole, and written with their outputs for the site.

python docs/_ext/notebooks.py           # runs all as they are, and writes their .ipynb
STEPS=8 python docs/_ext/notebooks.py --check   # runs all with few steps, and writes nothing
"""

import os
import sys
from pathlib import Path
from typing import Any

import jupytext
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
SECONDS = 600
"""That a cell may take."""


def execute(text: Path) -> Any:
    """The notebook of a text file, run from top to bottom in a process of its own.

    Raises:
        nbclient.exceptions.CellExecutionError: where a cell fails.
    """
    notebook = jupytext.read(text)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{text.stem}-{number}"  # the same each time
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # a bar of Jupyter's own, which draws nothing here
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", record_timing=False).execute()
    return notebook


if __name__ == "__main__":
    for text in sorted(FOLDER.glob("*.py")):
        executed = execute(text)
        if "--check" not in sys.argv:
            jupytext.write(executed, text.with_suffix(".ipynb"), fmt="ipynb")
        print(text.name)
