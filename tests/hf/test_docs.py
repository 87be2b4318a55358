"""The code in the docs runs as it stands, from top to bottom of a page."""

import re
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest

from foldrank.surgery import BACKBONES

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["backbones", "architectures", "optimizers", "from-dense"])
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE)
    assert code
    module = ModuleType(page)
    monkeypatch.setitem(sys.modules, page, module)
    with patch.dict(BACKBONES):
        exec(compile("\n".join(code), f"{page}.md", "exec"), module.__dict__)
