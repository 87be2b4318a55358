"""`foldrank finetune`: a checkpoint that learns to answer, or to classify."""

import argparse
import sys
from pathlib import Path
from typing import Any

from foldrank.commands.arguments import setting_value, with_notes
from foldrank.commands.checkpoint_arguments import add_checkpoint_arguments
from foldrank.commands.run_page import run_page
from foldrank.console import speaks_for_all
from foldrank.structured import read_yaml, to_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command line."""
    from foldrank.finetune.settings import default_of, setting_help, text_settings

    parser.description = (
        "Fine-tune a checkpoint on chats, prompts with answers, text, or labels, measure it on held-out examples "
        "before and after, and save a checkpoint of the same kind (docs/fine-tuning.md)."
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="the folder of this fine-tuning")
    parser.add_argument("--overwrite", action="store_true", help="replace what it holds")
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted one in it")
    parser.add_argument("--settings", type=Path, metavar="FILE", help="YAML with settings, such as a finetune.yaml")
    parser.add_argument("--print_config", action="store_true", help="print the resolved settings as YAML and stop")
    settings = parser.add_argument_group("settings", "each replaces one; null is none")
    for name, meaning in setting_help().items():
        default = default_of(name)
        shown = meaning if default is None else f"{meaning} (default: {default})"
        settings.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            type=setting_value(text_settings().get(name)),
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=shown.replace("%", "%%"),
        )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fine-tunes; returns the metrics."""
    from foldrank.finetune.settings import FinetuneSettings, setting_help

    given = {name: value for name, value in vars(arguments).items() if name in setting_help()}
    of_file = {} if arguments.settings is None else read_yaml(arguments.settings)
    of_file.pop("run", None)
    settings = FinetuneSettings.from_dict({**of_file, **given})
    if arguments.print_config:
        return {"config": settings.to_dict()}
    import torch

    from foldrank.finetune.finetune import finetune
    from foldrank.finetune.folder import FinetuneFolder
    from foldrank.train.malloc import apply_malloc_settings
    from foldrank.train.pretrain import InterruptedRunError

    if settings.device == "cpu" or not torch.accelerator.is_available():
        apply_malloc_settings()
    notes: list[str] = []
    try:
        with run_page(arguments.out, notes):
            metrics = finetune(
                arguments.checkpoint,
                settings,
                arguments.out,
                overwrite=arguments.overwrite,
                resume=arguments.resume or FinetuneFolder(arguments.out).goes_on_by_itself(),
                accept_changes=arguments.accept_changes,
                tell=notes.append,
            )
    except InterruptedRunError as stopped:
        if speaks_for_all():
            print(f"foldrank finetune: {stopped}", file=sys.stderr)
        raise SystemExit(128 + stopped.signal_number) from stopped
    page = str(arguments.out / "report.html")
    return with_notes({**metrics.to_dict(), "out": str(arguments.out), "page": page}, notes)


def show(result: dict[str, Any]) -> None:
    """Prints the figures before and after."""
    if "config" in result:
        sys.stdout.write(to_yaml(result["config"]))
        return
    from rich.table import Table

    from foldrank.console import console

    out = console()
    title = f"{result['checkpoint']} ({result['state']}) on {result['data']}, seed {result['seed']}"
    out.print(title, highlight=False, soft_wrap=True)
    figures = Table()
    of_tokens = "" if result["held_out_tokens"] is None else f", {result['held_out_tokens']:,} tokens"
    figures.add_column(f"of {result['held_out_examples']:,} held-out examples{of_tokens}")
    for column in ("before", "after"):
        figures.add_column(column, justify="right")
    for name, value in result["after"].items():
        figures.add_row(name.replace("_", " "), f"{result['before'][name]:.4f}", f"{value:.4f}")
    out.print(figures)
    out.print(
        f"{result['training_examples']:,} examples, {result['steps']:,} steps, {result['seconds']:.1f} s; "
        f"{result['params_trained']:,} of {result['params']:,} parameters trained",
        highlight=False,
    )
    out.print(f"fine-tuned checkpoint: {Path(result['out']) / 'model'}", highlight=False, soft_wrap=True)
    out.print(f"page of this run: {result['page']}", highlight=False, soft_wrap=True)
