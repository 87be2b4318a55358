"""The command line as a function: its exit code and what it printed."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from foldrank.cli import main


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a command came to."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        assert self.code == 0, self.stderr
        found = json.loads(self.stdout)
        assert isinstance(found, dict)
        return found


Foldrank = Callable[..., Done]


@pytest.fixture
def foldrank(capsys: pytest.CaptureFixture[str]) -> Foldrank:
    """Runs `foldrank ARGUMENTS` in this process."""

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Done(code=code, stdout=printed.out, stderr=printed.err)

    return run


def tree(root: Path) -> dict[str, bytes | None]:
    """Everything under a folder but lock files, which mean nothing: the content of files, None for folders."""
    found = {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}
    return {name: content for name, content in found.items() if "locks/" not in name}
