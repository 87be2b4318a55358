"""`foldrank info`: what a checkpoint is."""

import argparse
from collections import Counter
from dataclasses import asdict
from typing import Any

from foldrank.commands.checkpoint_arguments import add_checkpoint_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command line."""
    add_checkpoint_arguments(parser)
    parser.add_argument("--verify", action="store_true", help="compare every file with its checksum")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Reads the config and the headers of the weight files."""
    from foldrank.hf.checkpoint import inspect
    from foldrank.hf.checksums import verify_checksums

    result = asdict(inspect(arguments.checkpoint))
    if vars(arguments).get("verify"):
        told = verify_checksums(arguments.checkpoint, accept=arguments.accept_changes)
        result["verified"] = told or "every file is as it was saved"
    return result


def show(result: dict[str, Any]) -> None:
    """Prints a table."""
    from rich.table import Table

    from foldrank.console import console

    table = Table(title=result["path"], title_justify="left", show_header=False)
    table.add_column()
    table.add_column()
    meaning = {
        "dense": "dense: no low-rank layer",
        "folded": "folded: nothing left to fold, ready to deploy",
        "unfolded": "not folded: still has its residual or scale (foldrank fold makes it deployable)",
    }
    table.add_row("model", result["model_type"])
    table.add_row("state", meaning[result["state"]])
    table.add_row("parameters", f"{result['params']:,}")
    table.add_row("weight files", f"{result['bytes']:,} bytes, {', '.join(result['dtypes'])}")
    for name, value in result["shape"].items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    if result["low_rank"] is not None:
        ranks = Counter(result["low_rank"]["rank"].values())
        table.add_row("ranks", ", ".join(f"{rank} ({count} layers)" for rank, count in sorted(ranks.items())))
        extra = ", ".join(f"{name} {value}" for name, value in result["low_rank"]["extra_config"].items())
        table.add_row("backbone", result["low_rank"]["backbone"] + (f" ({extra})" if extra else ""))
        table.add_row("activation", str(result["low_rank"]["activation"]))
        if result["low_rank"]["scale"] is not None:
            table.add_row("scale", str(result["low_rank"]["scale"]))
        if (residual := result["low_rank"]["residual"]) is not None:
            table.add_row("residual", ", ".join(f"{name} {value}" for name, value in residual.items()))
    if "verified" in result:
        table.add_row("checksums", result["verified"])
    console().print(table)
