"""The functions of the standard library of the running Python, as examples of tasks that need no network."""

import ast
import sysconfig
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from foldrank.data.corpus import TEST_FOLDERS

LEAST_LINES, MOST_CHARS = 3, 1200
"""Of a function that is an example."""

HOLDS_STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)

ASK = "\n\n# What it does:"
"""Between a function and what it does."""


@dataclass(frozen=True, slots=True)
class Function:
    """One function."""

    file: str
    """Below the library's folder."""
    source: str
    """Without the docstring, not indented."""
    summary: str | None
    """The first line of the docstring."""


def stdlib_functions() -> Iterator[Function]:
    """In an order that is always the same; what occurs twice in a file is there once."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root)
        if TEST_FOLDERS & set(file.parts):
            continue
        seen: set[str] = set()
        for source, summary in _functions(path):
            if source not in seen:
                seen.add(source)
                yield Function(file.as_posix(), source, summary)


def _functions(path: Path) -> Iterator[tuple[str, str | None]]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (OSError, UnicodeError, SyntaxError, ValueError):
        return
    lines = text.splitlines()
    for node in _statements(tree):
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


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """As `ast.walk`, without expressions, which are most of a tree and hold no function."""
    nodes: deque[ast.AST] = deque([tree])
    while nodes:
        node = nodes.popleft()
        nodes.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, HOLDS_STATEMENTS))
        yield node
