"""Two small real tasks out of the standard library of the running Python: they need no network.

- `stdlib-summaries`: the first line of a function's docstring, from the function without it. Held out are all functions
  of some files, so that no held-out example shares a file with a training one.
- `stdlib-packages`: which package a function comes from; as many functions of each, so that chance is one over the
  number of packages. Files are on both sides, since some packages have few.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foldrank.data.corpus import TEST_FOLDERS

PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")
"""Labels of `stdlib-packages`: of many functions, and in every distribution of Python."""

SHIPPED = {"stdlib-summaries": "language", "stdlib-packages": "classification"}

LEAST_LINES, MOST_CHARS = 3, 1200
"""Of a function that is an example."""


def rows(name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The examples of a shipped task, each with what decides whether it is held out, in an order that does not change.

    Args:
        name: of `SHIPPED`.
    """
    if name != "stdlib-packages":
        yield from _examples(name)
        return
    by_package: dict[str, list[tuple[dict[str, Any], str]]] = {package: [] for package in PACKAGES}
    for row, _ in _examples(name):
        by_package[row["label"]].append((row, hashlib.sha256(row["text"].encode()).hexdigest()))
    fewest = min(map(len, by_package.values()))
    for examples in by_package.values():
        yield from sorted(examples, key=lambda example: example[1])[:fewest]


def _examples(name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Each with its file."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root)
        if TEST_FOLDERS & set(file.parts) or (name == "stdlib-packages" and file.parts[0] not in PACKAGES):
            continue
        seen: set[bytes] = set()
        for source, docstring in _functions(path):
            digest = hashlib.sha256(source.encode()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            if name == "stdlib-packages":
                yield {"text": source, "label": file.parts[0]}, str(file)
            elif docstring is not None:
                yield {"prompt": f"{source}\n\n# What it does:", "completion": f" {docstring}"}, str(file)


def _functions(path: Path) -> Iterator[tuple[str, str | None]]:
    """The source of each function of a file without its docstring, and the first line of that."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (OSError, UnicodeError, SyntaxError, ValueError):
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0]
        docstring = ast.get_docstring(node)
        dropped = range(first.lineno - 1, first.end_lineno or first.lineno) if docstring is not None else range(0)
        kept = [lines[at] for at in range(node.lineno - 1, node.end_lineno or node.lineno) if at not in dropped]
        indent = len(kept[0]) - len(kept[0].lstrip()) if kept else 0
        source = "\n".join(line[indent:] if line[:indent].isspace() else line for line in kept)
        summary = (docstring or "").strip().splitlines()
        if len(kept) >= LEAST_LINES and len(source) <= MOST_CHARS:
            yield source, (summary[0].strip() or None) if summary else None
