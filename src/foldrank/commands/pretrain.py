"""`foldrank pretrain`: arguments, the call, and the summary that a person reads."""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from foldrank.commands.progress import Preparation
from foldrank.commands.recipe_arguments import add_recipe_arguments, recipe_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command line."""
    parser.description = "Train a model from a recipe, fold it, verify the fold and save the folded checkpoint."
    add_recipe_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/RECIPE)")
    parser.add_argument("--overwrite", action="store_true", help="replace what the run's folder holds")
    parser.add_argument(
        "--resume",
        nargs="?",
        type=Path,
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="go on with the interrupted run in the folder, from its newest checkpoint or the one named",
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved settings as YAML and stop")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains; returns the metrics and where everything lies."""
    recipe = recipe_from(arguments)
    if arguments.print_config:
        return {"config": recipe.to_dict()}
    from foldrank.train.pretrain import InterruptedRunError, pretrain

    name = Path(arguments.recipe).stem
    out = arguments.out or Path("runs") / name
    try:
        with Preparation() as progress:
            metrics = pretrain(
                recipe, out, name=name, overwrite=arguments.overwrite, resume=arguments.resume, progress=progress
            )
    except InterruptedRunError as stopped:
        print(f"foldrank pretrain: {stopped}", file=sys.stderr)
        raise SystemExit(128 + stopped.signal_number) from stopped
    return {**metrics, "out": str(out)}


def show(result: dict[str, Any]) -> None:
    """Prints the summary."""
    if "config" in result:
        sys.stdout.write(yaml.safe_dump(result["config"], sort_keys=False))
        return
    out = Path(result["out"])
    console = Console(highlight=False)
    losses = Table(title="losses", title_justify="left")
    for column in ("step", "training", "validation"):
        losses.add_column(column, justify="right")
    for row in result["history"]:
        training = "" if row["train_loss"] is None else f"{row['train_loss']:.4f}"
        losses.add_row(str(row["step"]), training, f"{row['val_loss']:.4f}")
    console.print(losses)

    share = result["params"] / result["params_dense"]
    summary = Table(title=f"{result['recipe']}, seed {result['seed']}", title_justify="left", show_header=False)
    summary.add_column()
    summary.add_column(overflow="fold")  # or a long path would be cut
    for label, value in (
        ("parameters, low rank", f"{result['params']:,} ({share:.0%} of dense)"),
        ("parameters, dense equivalent", f"{result['params_dense']:,}"),
        ("training tokens", f"{result['tokens']:,}"),
        ("training seconds", f"{result['seconds']:.1f}"),
        ("tokens per second", f"{result['tokens_per_second']:,.0f}"),
        ("validation loss, before the fold", f"{result['val_loss']:.6f} (over {result['val_tokens']:,} tokens)"),
        ("validation loss, folded", f"{result['val_loss_folded']:.6f}"),
        ("validation perplexity, before the fold", f"{result['val_perplexity']:.4f}"),
        ("validation perplexity, folded", f"{result['val_perplexity_folded']:.4f}"),
        ("layers folded", str(result["folded_layers"])),
        ("largest change of a logit by the fold", f"{result['fold_max_abs_logit_drift']:.2e}"),
        ("largest rounding of a weight", f"{result['fold_max_abs_weight_rounding']:.2e}"),
        ("same next token before and after", f"{result['fold_argmax_agreement']:.2%}"),
        ("folded checkpoint", str(out / "folded")),
        ("trained weights, not folded", str(out / "unfolded")),
        ("these figures", str(out / "metrics.json")),
        ("settings", str(out / "config.yaml")),
        ("log", str(out / "log.jsonl")),
    ):
        summary.add_row(label, value)
    console.print(summary)
    console.print(Panel(result["sample"], title="written by the folded model", title_align="left"), markup=False)
