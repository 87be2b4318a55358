"""`foldrank pretrain`: arguments, the call, and the summary that a person reads."""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from foldrank.commands.arguments import with_notes
from foldrank.commands.progress import PreparationProgressBar
from foldrank.commands.recipe_arguments import add_recipe_arguments, recipe_from
from foldrank.commands.run_page import run_page
from foldrank.console import console, speaks_for_all
from foldrank.structured import to_yaml

GIB = 1 << 30


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
    parser.add_argument(
        "--branch-from",
        type=Path,
        metavar="RUN",
        help="begin a new run at a stable checkpoint of another (its folder, or one of its checkpoints), with its data "
        "and optimizer, to an end of its own (docs/going-on.md)",
    )
    parser.add_argument(
        "--init-from",
        type=Path,
        metavar="CHECKPOINT",
        help="begin with the weights of a run or a checkpoint, dense ones approximated at low rank (docs/going-on.md)",
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved settings as YAML and stop")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains; returns the metrics and where everything lies."""
    recipe = recipe_from(arguments)
    if arguments.print_config:
        return {"config": recipe.to_dict()}
    import torch

    from foldrank.train.malloc import apply_malloc_settings
    from foldrank.train.pretrain import InterruptedRunError, pretrain
    from foldrank.train.run_folder import RunFolder

    name, notes = Path(arguments.recipe).stem, list[str]()
    out = arguments.out or Path("runs") / name
    if recipe.train.device == "cpu" or not torch.accelerator.is_available():
        apply_malloc_settings()
    try:
        with run_page(out, notes), PreparationProgressBar() as progress:
            metrics = pretrain(
                recipe,
                out,
                name=name,
                overwrite=arguments.overwrite,
                resume=arguments.resume or RunFolder(out).goes_on_by_itself(),
                branch_from=arguments.branch_from,
                init_from=arguments.init_from,
                progress=progress,
            )
    except InterruptedRunError as stopped:
        if speaks_for_all():
            print(f"foldrank pretrain: {stopped}", file=sys.stderr)
        raise SystemExit(128 + stopped.signal_number) from stopped
    return with_notes({**metrics.to_dict(), "out": str(out), "page": str(out / "report.html")}, notes)


def show(result: dict[str, Any]) -> None:
    """Prints the summary."""
    if "config" in result:
        sys.stdout.write(to_yaml(result["config"]))
        return
    from foldrank.train.metrics import RunMetrics, perplexity_of
    from foldrank.train.run_folder import RunFolder

    metrics, run = RunMetrics.from_dict(result), RunFolder(Path(result["out"]))
    out = console()
    losses = Table(title="losses", title_justify="left")
    for column in ("step", "training", "validation"):
        losses.add_column(column, justify="right")
    for point in metrics.history:
        training = "" if point.train_loss is None else f"{point.train_loss:.4f}"
        losses.add_row(str(point.step), training, f"{point.val_loss:.4f}")
    out.print(losses)

    utilized, started = [], [("where it comes from", sentence) for sentence in metrics.lineage]
    if (bare := metrics.start_loss_without_residual) is not None:
        started.append(("first sequences, with residual and without", f"{metrics.start_loss:.4f}, {bare:.4f}"))
    if metrics.mfu is not None:
        utilized.append(("model FLOPs utilization", f"{metrics.mfu:.1%}"))
    if metrics.peak_memory_bytes is not None:
        planned = sum(metrics.memory_bytes.values())
        utilized.append(("peak memory, GiB", f"{metrics.peak_memory_bytes / GIB:.2f} (planned {planned / GIB:.2f})"))
    of_sources = [
        (f"tokens of {name}", f"{tokens:,} ({tokens / metrics.tokens:.2%}{_loss_of(metrics, name)})")
        for name, tokens in metrics.tokens_by_source.items()
    ]
    fraction = metrics.params / metrics.params_dense
    summary = Table(title=f"{metrics.recipe}, seed {metrics.seed}", title_justify="left", show_header=False)
    summary.add_column()
    summary.add_column(overflow="fold")  # or a long path would be cut
    for label, value in (
        ("parameters, low rank", f"{metrics.params:,} ({fraction:.0%} of dense)"),
        ("parameters, dense equivalent", f"{metrics.params_dense:,}"),
        ("training tokens", f"{metrics.tokens:,}"),
        *of_sources,
        ("training seconds", f"{metrics.seconds:.1f}"),
        ("tokens per second", f"{metrics.tokens_per_second:,.0f}"),
        *utilized,
        *started,
        ("validation loss, before the fold", f"{metrics.val_loss:.6f} (over {metrics.val_tokens:,} tokens)"),
        ("validation loss, folded", f"{metrics.val_loss_folded:.6f}"),
        ("validation perplexity, before the fold", f"{perplexity_of(metrics.val_loss):.4f}"),
        ("validation perplexity, folded", f"{perplexity_of(metrics.val_loss_folded):.4f}"),
        ("layers folded", str(metrics.folded_layers)),
        ("largest change of a logit by the fold", f"{metrics.fold_max_abs_logit_drift:.2e}"),
        ("largest rounding of a weight", f"{metrics.fold_max_abs_weight_rounding:.2e}"),
        ("same next token before and after", f"{metrics.fold_argmax_agreement:.2%}"),
        ("folded checkpoint", str(run.folded)),
        ("trained weights, not folded", str(run.unfolded)),
        ("these figures", str(run.metrics)),
        ("settings", str(run.config)),
        ("log", str(run.log)),
        ("page of this run", str(result["page"])),
    ):
        summary.add_row(label, value)
    out.print(summary)
    out.print(Panel(Text(metrics.sample), title="written by the folded model", title_align="left"))


def _loss_of(metrics: Any, source: str) -> str:
    loss = metrics.val_loss_by_source.get(source)
    return "" if loss is None else f"; validation loss, folded, {loss:.6f}"
