"""What a finished run is to the tests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of `foldrank pretrain` from beginning to end. Tests read its folder and change nothing in it."""

    recipe: Path
    out: Path
    stdout: str
    stderr: str
    metrics: dict[str, Any]
