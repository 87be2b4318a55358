"""Sources of text: each yields documents in a fixed order. The built-in one needs no network."""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
"""Folders of the standard library that are no part of the corpus."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text with the name by which messages speak of it."""

    name: str
    text: str


def documents(source: str) -> Iterator[Document]:
    """The documents of `source`: "stdlib", or a text file or a folder of text files (all that decode as UTF-8).

    Raises:
        ValueError: for a source that does not exist.
    """
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        inside = sorted(path for path in root.rglob("*.py") if not TEST_FOLDERS & set(path.relative_to(root).parts))
        yield from _texts(root, inside)
    elif (path := Path(source)).is_file():
        yield from _texts(path.parent, [path])
    elif path.is_dir():
        yield from _texts(path, sorted(child for child in path.rglob("*") if child.is_file()))
    else:
        raise ValueError(f"no such corpus: {source!r} is neither 'stdlib' nor a file nor a folder")


def _texts(root: Path, paths: list[Path]) -> Iterator[Document]:
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield Document(name=str(path.relative_to(root)), text=text)
