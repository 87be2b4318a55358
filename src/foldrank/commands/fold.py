"""`foldrank fold`: an unfolded checkpoint to a folded one."""

import argparse
from pathlib import Path
from typing import Any

from foldrank.commands.arguments import with_notes
from foldrank.commands.checkpoint_arguments import add_checkpoint_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command line."""
    add_checkpoint_arguments(parser, "folder of an unfolded checkpoint")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="new folder for the folded one")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Folds."""
    from foldrank.hf.checkpoint import fold_checkpoint

    notes: list[str] = []
    layers = fold_checkpoint(
        arguments.checkpoint, arguments.out, accept_changes=arguments.accept_changes, tell=notes.append
    )
    result = {"checkpoint": str(arguments.checkpoint), "out": str(arguments.out), "folded_layers": layers}
    return with_notes(result, notes)


def show(result: dict[str, Any]) -> None:
    """Says what was done."""
    print(f"folded {result['folded_layers']} layers of {result['checkpoint']} into {result['out']}")
