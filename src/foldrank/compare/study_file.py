"""A study's file: how it is found, read and checked, and whose a study's folder is."""

import math
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from foldrank.compare.study import ADAPTER, Study
from foldrank.structured import read_yaml

MOST_OF_A_GRID = 1024
"""Methods that one line of a study may stand for."""

WRITTEN_BY_US = "# What the study in this folder asks; written by foldrank compare.\n"
"""First line of a `study.yaml` that may be written anew."""


def check_folder(out: Path, study_file: Path) -> None:
    """Refuses a folder that is no study's, and one whose `study.yaml` somebody else wrote.

    Raises:
        FileExistsError: saying what the folder holds.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    ours = out / "study.yaml"
    if out.is_dir() and (out / "records").is_dir() and ours.is_file() and not _same(ours, study_file):
        return
    if ours.is_file() and ours.read_text(encoding="utf-8", errors="replace").startswith(WRITTEN_BY_US):
        return
    what = "holds files that are no study's" if out.is_dir() else "is a file"
    raise FileExistsError(f"{out} {what}: choose another folder with --out")


def _same(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


def find_study(name: str) -> Path:
    """The file of a shipped study by name, or the one named.

    Raises:
        ValueError: for a name that is neither.
    """
    shipped = {file.stem: file for file in (Path(__file__).parent.parent / "recipes").glob("*.yaml")}
    if name in shipped:
        return shipped[name]
    if not name.lower().endswith((".yaml", ".yml")):
        raise ValueError(f"no study is called {name!r}: give a .yaml file, or one of {', '.join(sorted(shipped))}")
    return Path(name)


def load_study(file: Path) -> Study:
    """Reads a study and checks that each of its recipes can be made.

    Raises:
        ValueError: one line that names what is unknown, missing or out of range.
    """
    settings = read_yaml(file, "a study")
    methods = settings.get("methods")
    try:
        if isinstance(methods, list):
            entries = [{"name": entry} if isinstance(entry, str) else entry for entry in methods]
            settings["methods"] = [method for entry in entries for method in _expanded(entry)]
        study = ADAPTER.validate_python(settings)
    except ValidationError as error:
        messages = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        raise ValueError(f"{file}: {messages}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    for method in study.methods:
        for corpus in study.corpora_of(method):
            for size in study.sizes:
                study.recipe(corpus, size, method)
    return study


def _expanded(entry: Any) -> list[Any]:
    """The methods that one with a `grid` stands for: each value of each setting with each of the others."""
    if not isinstance(entry, dict) or "grid" not in entry:
        return [entry]
    entry = dict(entry)
    grid, name = entry.pop("grid"), entry.get("name", "")
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise ValueError(f"grid of method {name!r} must have a list of values for each setting, got {grid!r}")
    if (count := math.prod(map(len, grid.values()))) > MOST_OF_A_GRID:
        raise ValueError(f"grid of method {name!r} stands for {count} methods, and at most {MOST_OF_A_GRID} are taken")
    methods = []
    for values in product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        method = {**entry, "settings": {**entry.get("settings", {}), **chosen}}
        if "rank" in chosen:
            method["rank"] = method["settings"].pop("rank")
        parts = (f"{setting.rpartition('.')[2].replace('_', '-')}-{value}" for setting, value in chosen.items())
        method.setdefault("kind", name)
        methods.append({**method, "name": "-".join((name, *parts))})
    return methods
