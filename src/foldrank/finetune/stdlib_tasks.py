"""Two small real tasks out of the standard library of the running Python: they need no network.

- `stdlib-summaries`: the first line of a function's docstring, from the function without it. Held out are all functions
  of some files, so that no held-out example shares a file with a training one.
- `stdlib-packages`: which package a function comes from; as many functions of each, so that chance is one over the
  number of packages. Files are on both sides, since some packages have few.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

from foldrank.data.stdlib_functions import ASK, stdlib_functions

PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")
"""Labels of `stdlib-packages`: of many functions, and in every distribution of Python."""

SHIPPED = {"stdlib-summaries": "language", "stdlib-packages": "classification"}


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
    for function in stdlib_functions():
        if name == "stdlib-packages":
            if (package := function.file.partition("/")[0]) in PACKAGES:
                yield {"text": function.source, "label": package}, function.file
        elif function.summary is not None:
            yield {"prompt": f"{function.source}{ASK}", "completion": f" {function.summary}"}, function.file
