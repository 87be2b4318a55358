"""What the command says of itself, and how little it needs to say it."""

import json
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import foldrank as package
from foldrank import cli
from foldrank.cli import COMMANDS, main

from ..called import Foldrank

NAMES = [command.name for command in COMMANDS]

LOADED = """
import contextlib, io, json, sys
from foldrank.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    code = main(json.loads(sys.argv[1]))
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names))]))
"""


def loaded(*arguments: str) -> list[str]:
    """The packages outside the standard library that a process with these arguments has imported at its end."""
    program = [sys.executable, "-c", LOADED, json.dumps(arguments)]
    done = subprocess.run(program, capture_output=True, text=True, check=True, timeout=60)
    code, packages = json.loads(done.stdout)
    assert code == 0
    return [name for name in packages if not name.startswith(("_", "sitecustomize"))]


def test_help_of_the_whole_needs_nothing_but_the_standard_library() -> None:
    assert loaded("--help") == ["foldrank"]
    assert loaded("--version") == ["foldrank"]


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command_does_not_wait_for_torch(name: str) -> None:
    heavy = {"torch", "transformers", "numpy", "tokenizers", "accelerate", "safetensors", "datasets"}
    assert heavy.isdisjoint(loaded(name, "--help"))


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command_reads_well(foldrank: Foldrank, name: str) -> None:
    done = foldrank(name, "--help")
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: foldrank {name} ")
    assert "--json" in done.stdout
    # Each line that names an option explains it there or in the line below.
    lines = done.stdout[done.stdout.index("options:") :].splitlines()
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("  -"):
            assert "  " in line.strip() or below.startswith(" " * 20), line


def test_help_lists_each_command_with_its_summary(foldrank: Foldrank) -> None:
    done = foldrank("--help")
    assert done.code == 0
    words = " ".join(done.stdout.split())
    assert all(f"{command.name} {command.summary}" in words for command in COMMANDS)


def test_version(foldrank: Foldrank) -> None:
    assert foldrank("--version").stdout == f"foldrank {package.__version__}\n"


def test_the_installed_command_is_this_one() -> None:
    (script,) = entry_points(group="console_scripts", name="foldrank")
    assert script.load() is main
    assert main is cli.main
