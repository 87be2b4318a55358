"""The `foldrank` command: one table of commands. Each imports what it needs when it is called, not before."""

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

from foldrank import __version__


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One row of the table: the module foldrank.commands.NAME has `add_arguments`, `run` and `show`."""

    name: str
    summary: str


COMMANDS = (
    Command(name="plan", summary="what a recipe will cost: parameters, FLOPs, memory, hours; nothing is allocated"),
    Command(name="prepare", summary="tokenize text once into a folder that pretrain reads"),
    Command(name="pretrain", summary="train a model from a recipe, fold it, verify the fold, save it"),
    Command(name="compare", summary="run a study: methods x learning rates x seeds on the same data"),
    Command(name="report", summary="what a study shows: tables, intervals and charts, as a page and as Markdown"),
    Command(name="fold", summary="fold an unfolded checkpoint into a plain low-rank one, file by file"),
    Command(name="evaluate", summary="loss and perplexity of a checkpoint, weighted by tokens"),
    Command(name="generate", summary="let a checkpoint continue a text"),
    Command(name="bench", summary="what methods cost beside one another in time and memory, on this machine"),
    Command(name="info", summary="what a checkpoint is: folded or not, ranks, parameters"),
)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 where it did what was asked, 2 for the user's mistake, said in one line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(
        prog="foldrank",
        description="Pre-train language models from low-rank layers, with a residual that folds away (DLR).",
        epilog="foldrank COMMAND --help tells about one command. FOLDRANK_DEBUG=1 shows tracebacks.",
    )
    parser.add_argument("--version", action="version", version=f"foldrank {__version__}")
    chosen = parser
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for command in COMMANDS:
        named = bool(argv) and argv[0] == command.name
        sub = commands.add_parser(command.name, help=command.summary, description=command.summary, add_help=named)
        if named:
            chosen = sub
            module = import_module(f"foldrank.commands.{command.name}")
            module.add_arguments(sub)
            sub.add_argument("--json", action="store_true", help="print one JSON object, and nothing else, as result")
    try:
        arguments, unknown = parser.parse_known_args(argv)
        if unknown:
            chosen.error(f"unrecognized arguments: {' '.join(unknown)}" + _nearest(unknown[0], chosen))
        return _run(import_module(f"foldrank.commands.{arguments.command}"), arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


def _run(module: Any, arguments: argparse.Namespace) -> int:
    try:
        _quiet()
        result: dict[str, Any] = module.run(arguments)
        show: Callable[[dict[str, Any]], None] = module.show
        if os.environ.get("RANK", "0") == "0":  # one process of a torchrun speaks for all
            print(json.dumps(result)) if arguments.json else show(result)  # noqa: T201
    except (ValueError, OSError) as error:
        if os.environ.get("FOLDRANK_DEBUG"):
            raise
        print(f"foldrank {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print(f"foldrank {arguments.command}: interrupted", file=sys.stderr)  # noqa: T201
        return 130
    return 0


def _nearest(option: str, parser: argparse.ArgumentParser) -> str:
    known = set(re.findall(r"--[\w.-]+", parser.format_help()))
    near = difflib.get_close_matches(option.partition("=")[0], known, n=3)
    return f"; the nearest are {', '.join(near)}" if near else ""


def _quiet() -> None:
    # Our own progress takes the place of the bars that transformers draws for each file.
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


if __name__ == "__main__":
    sys.exit(main())
