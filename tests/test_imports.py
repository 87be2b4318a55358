"""What may import what: the table in CONTRIBUTING.md, held against the imports in the code."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "foldrank"
ROW = re.compile(r"^\| `(\w+)` \|.*\|([^|]*)\|$", re.MULTILINE)


@cache
def table() -> dict[str, set[str]]:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return {part: set(re.findall(r"`(\w+)`", allowed)) for part, allowed in ROW.findall(text)}


def modules() -> dict[str, Path]:
    """Every module by its dotted name below foldrank; a package by its own."""
    found = {}
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of foldrank that a file imports, wherever in it: in functions and for type checkers too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # Only what is written beside a checkpoint may say "here", where the others lie.
            beside = node.level == 1 and file.name.startswith("modeling_")
            assert node.level == 0 or beside, f"{file} has a relative import"
            module = f"foldrank.{file.parent.name}.{node.module}" if beside else node.module or ""
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            below = name.removeprefix("foldrank.")
            if name.startswith("foldrank.") and below in known:
                yield below


@cache
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imported(file, known)) - {name} for name, file in known.items() if name}


def part_of(module: str) -> str:
    return module.partition(".")[0]


def test_the_table_names_every_part_and_no_other() -> None:
    assert set(table()) == {part_of(module) for module in graph()}
    assert len(table()) == 25


@pytest.mark.parametrize("module", sorted(graph()))
def test_a_module_imports_what_the_table_allows(module: str) -> None:
    part = part_of(module)
    others = {part_of(other) for other in graph()[module]} - {part}
    assert others <= table()[part], f"{module} imports {sorted(others - table()[part])}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    links = graph()
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module in done:
            return
        for other in sorted(links[module]):
            # A package's list of names stands for the modules behind it.
            if not module.startswith(other + "."):
                follow(other, (*path, module))
        done.add(module)

    for module in sorted(links):
        follow(module, ())
