"""The `foldrank` command: one table of commands. Each imports what it needs when it is called, not before."""

import argparse
import difflib
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

from foldrank import __version__
from foldrank.console import one_line, setup_streams, speaks_for_all


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One row of the table: the module foldrank.commands.NAME has `add_arguments`, `run` and `show`."""

    name: str
    summary: str
    light: bool = False
    """Whether it needs no transformers, whose import takes seconds."""


COMMANDS = (
    Command(name="plan", summary="what a recipe will cost: parameters, FLOPs, memory, hours; nothing is allocated"),
    Command(name="suggest", summary="which shipped recipes a budget pays for, and what each would cost"),
    Command(name="prepare", summary="tokenize text once into a folder that pretrain reads"),
    Command(name="pretrain", summary="train a model from a recipe, fold it, verify the fold, save it"),
    Command(name="compare", summary="run a study: methods x learning rates x seeds on the same data"),
    Command(name="watch", summary="a run or a study on the screen while it goes on", light=True),
    Command(name="report", summary="what runs or a study show, as a page that needs no network", light=True),
    Command(name="finetune", summary="teach a checkpoint to answer or to classify, and measure it before and after"),
    Command(name="factorize", summary="a dense checkpoint at low rank: its loss by rank, and the new checkpoint"),
    Command(name="fold", summary="fold an unfolded checkpoint into a plain low-rank one, file by file"),
    Command(name="export", summary="a folded checkpoint as a plain dense one, for tools that know nothing of low rank"),
    Command(name="evaluate", summary="loss, perplexity and bits per byte of a checkpoint, weighted by tokens"),
    Command(name="generate", summary="let a checkpoint continue a text"),
    Command(name="bench", summary="what methods cost beside one another in time and memory, on this machine"),
    Command(name="info", summary="what a checkpoint is: folded or not, ranks, parameters"),
    Command(name="completion", summary="what a shell needs to complete commands, options and files", light=True),
    Command(name="doctor", summary="what this machine and installation have: what a bug report needs"),
)


EXIT_CODES = {
    "0": "done",
    "2": "something to mend",
    "1": "a defect of foldrank",
    "128 and its number": "ended by a signal",
}
"""What a command ends with."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"{self.prog}: {message} (see {self.prog} --help)") + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 where it did what was asked; 2 for what the user can mend, said in one line; 1 for a defect of foldrank; and
        128 and the signal's number where a signal ended it.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    setup_streams()
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    parser, named = make_parser(argv[:1])
    chosen = named.get(argv[0], parser) if argv else parser
    try:
        arguments, unknown = parser.parse_known_args([_text(argument, chosen) for argument in argv])
        if unknown:
            chosen.error(f"unrecognized arguments: {' '.join(unknown)}" + _nearest(unknown[0], chosen))
        if not next(command for command in COMMANDS if command.name == arguments.command).light:
            _quiet()
        return _run(import_module(f"foldrank.commands.{arguments.command}"), arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


def make_parser(named: Collection[str]) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and by name those of the commands in `named`, whose arguments alone it knows: they take imports."""
    parser = _Parser(
        prog="foldrank",
        description="Pre-train language models from low-rank layers, with a residual that folds away (DLR).",
        epilog="foldrank COMMAND --help tells about one command. FOLDRANK_DEBUG=1 shows tracebacks. Exit codes: "
        f"{', '.join(f'{code} {meaning}' for code, meaning in EXIT_CODES.items())}.",
    )
    parser.add_argument("--version", action="version", version=f"foldrank {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    parsers: dict[str, argparse.ArgumentParser] = {}
    for command in COMMANDS:
        wanted = command.name in named
        sub = commands.add_parser(command.name, help=command.summary, description=command.summary, add_help=wanted)
        if wanted:
            import_module(f"foldrank.commands.{command.name}").add_arguments(sub)
            sub.add_argument("--json", action="store_true", help="print one JSON object, and nothing else, as result")
            parsers[command.name] = sub
    return parser, parsers


def full_parser() -> argparse.ArgumentParser:
    """The parser with the arguments of all commands, for the documentation."""
    return make_parser([command.name for command in COMMANDS])[0]


def _complete() -> None:
    """What a shell asks for at a tab (foldrank completion); ends the process."""
    import argcomplete

    words = os.environ.get("COMP_LINE", "").split()
    argcomplete.autocomplete(make_parser(words[1:2])[0])


def _run(module: Any, arguments: argparse.Namespace) -> int:
    try:
        result: dict[str, Any] = module.run(arguments)
        return _show(module.show, result, as_json=arguments.json) if speaks_for_all() else 0
    except Exception as error:
        if os.environ.get("FOLDRANK_DEBUG"):
            raise
        to_mend = _to_mend(error)
        message = (
            to_mend or f"{type(error).__name__}: {error}. This is a defect of foldrank: FOLDRANK_DEBUG=1 shows more"
        )
        print(one_line(f"foldrank {arguments.command}: {message}"), file=sys.stderr)  # noqa: T201
        return 2 if to_mend else 1
    except KeyboardInterrupt:
        print(f"foldrank {arguments.command}: interrupted", file=sys.stderr)  # noqa: T201
        return 130


def _show(show: Callable[[dict[str, Any]], None], result: dict[str, Any], *, as_json: bool) -> int:
    """Prints a result, and gives the exit code: 0, or that of a reader who went away, `head` for one."""
    try:
        if as_json:
            _print_json(result)
        else:
            show(result)
            for note in result.get("notes", ()):
                print(one_line(f"note: {note}"), file=sys.stderr)  # noqa: T201
        sys.stdout.flush()  # what cannot be written is told here, and not by the interpreter on its way out
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left in the buffer
        return 128 + signal.SIGPIPE
    return 0


def _print_json(result: dict[str, Any]) -> None:
    from foldrank.structured import to_json

    print(to_json(result))  # noqa: T201


def _to_mend(error: Exception) -> str | None:
    """What the user can mend; None where that is nothing."""
    if isinstance(error, ValueError | OSError):
        return str(error)
    if isinstance(error, RuntimeError | MemoryError):
        from foldrank.train.device_memory import is_out_of_memory

        if is_out_of_memory(error):
            return f"not enough memory, where foldrank plan says what a recipe needs ({error or 'out of memory'})"
    return None


def _text(argument: str, parser: argparse.ArgumentParser) -> str:
    """An argument as UTF-8, whatever the locale; what is none is refused, since no file or text of ours may hold it."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        parser.error(f"{argument!r} is no text in UTF-8")


def _nearest(option: str, parser: argparse.ArgumentParser) -> str:
    known = set(re.findall(r"--[\w.-]+", parser.format_help()))
    near = difflib.get_close_matches(option.partition("=")[0], known, n=3)
    return f"; the nearest are {', '.join(near)}" if near else ""


def _quiet() -> None:
    # Our own progress takes the place of the bars that transformers draws for each file.
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub.set_verbosity_error()  # it warns of every try, where one line of ours says what came of them


if __name__ == "__main__":
    sys.exit(main())
