"""`foldrank suggest`: which shipped recipes a budget pays for."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from foldrank.commands.arguments import add_gpu_arguments, mfu_of, number
from foldrank.console import console

GIB = 1 << 30

SOURCES = (
    "Parameters: counted on the model's shapes. FLOPs and memory: the formulas of foldrank/train/accounting.py, in "
    "bfloat16, memory an upper bound within 90 % of the GPU's. Hours: FLOPs over GPUs x peak x MFU, without "
    "evaluation and saving.",
    "Steps, ranks and rates of llama-*: the published protocol and CoLA's settings (foldrank/recipes/llama.py); of all "
    "others: ours, untuned. They are as in the recipe, whatever the number of steps is here.",
    "Perplexity: of validation on C4, after the paper's own tokens (1.1B, 2.2B, 6.4B, 13.1B at 60M to 1B), by other "
    "code; nothing is said of runs that nobody has made. With DLR (-dlr) a recipe costs the same; --study shows "
    "what runs of your own came to.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command line."""
    parser.description = (
        "Which shipped recipes, dense and low-rank, a budget pays for: parameters, tokens, FLOPs, memory, hours, and "
        "where each number is from. Nothing is said of losses but what is on record."
    )
    parser.add_argument("--parameters", type=number(1, 1e13), metavar="N", help="of the deployed model, at most")
    parser.add_argument("--tokens", type=number(1, 1e15), metavar="N", help="to train on, such as 2e9")
    parser.add_argument("--flops", type=number(1, 1e30), metavar="N", help="of the whole training, at most")
    parser.add_argument("--hours", type=number(0, 1e6), metavar="H", help="of the whole training, at most; needs --gpu")
    parser.add_argument("--gpu", metavar="NAME", help="such as h100: its peak and memory are known")
    add_gpu_arguments(parser)
    parser.add_argument(
        "--ranks",
        type=number(0, 1),
        nargs="+",
        default=[],
        metavar="SHARE",
        help="ranks besides the recipe's own, as shares of the width, such as 0.125 0.5",
    )
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="default: adamw")
    parser.add_argument(
        "--study", type=Path, action="append", default=[], metavar="DIR", help="of foldrank compare: its records too"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Looks for candidates."""
    mfu = mfu_of(arguments)
    if any(not share > 0 for share in arguments.ranks):
        raise ValueError("--ranks must lie in (0, 1]: they are shares of the width")
    if arguments.hours is not None and arguments.gpu is None:
        raise ValueError("--hours needs the GPU that they are of: --gpu h100")
    records = [row for folder in arguments.study for row in _records(folder)]

    from foldrank.train.candidates import Budget, candidates
    from foldrank.train.utilization import GPUS

    gpu = None
    if arguments.gpu is not None:
        wanted = arguments.gpu.lower().replace("-", " ")
        gpu = next((each for each in GPUS if each.name.lower() == wanted), None)
        if gpu is None:
            known = ", ".join(each.name.lower() for each in GPUS)
            raise ValueError(f"--gpu {arguments.gpu} is not known, only {known}: give --flops in place of hours")
    whole = {
        name: None if (value := getattr(arguments, name)) is None else int(value) for name in ("parameters", "tokens")
    }
    budget = Budget(
        **whole,
        flops=arguments.flops,
        hours=arguments.hours,
        gpus=arguments.gpus,
        flops_per_second=None if gpu is None else gpu.peak_flops * mfu,
        gpu_memory=None if gpu is None else gpu.memory_gib * GIB,
    )
    found = candidates(budget, ranks=arguments.ranks, optimizer=arguments.optimizer)
    rows = [
        {**asdict(each), "tokens_per_parameter": each.tokens_per_parameter, "command": _command(each)} for each in found
    ]
    return {
        "budget": {**asdict(budget), "gpu": None if gpu is None else gpu.name, "mfu": mfu},
        "candidates": rows,
        "records": records,
        "sources": list(SOURCES),
    }


def _command(candidate: Any) -> str:
    settings = {
        name: {None: "null", True: "true", False: "false"}.get(value, value)
        for name, value in candidate.settings.items()
    }
    return f"foldrank pretrain {candidate.recipe}" + "".join(f" --{name} {value}" for name, value in settings.items())


def _records(folder: Path) -> list[dict[str, Any]]:
    from foldrank.compare.analysis import analyse_folder

    return [
        {
            "study": str(folder),
            "corpus": table.corpus,
            "size": table.size,
            "method": row.method,
            "parameters": row.costs.parameters,
            "tokens": row.costs.tokens,
            "learning_rate": row.learning_rate,
            "loss": asdict(row.test),
        }
        for table in analyse_folder(folder).tables
        for row in table.rows
        if row.costs is not None and row.test is not None
    ]


def show(result: dict[str, Any]) -> None:
    """Prints the tables, and where their numbers are from."""
    out = console()
    budget, rows = result["budget"], result["candidates"]
    same = budget["tokens"] is not None
    title = "within the budget, the largest first" + (f": {_short(budget['tokens'])} tokens each" if same else "")
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("recipe", no_wrap=True)
    on_gpu = budget["gpu"] is not None
    columns = ["rank", "params", *(() if same else ("tokens",)), "tok/par", "FLOPs", "rate"]
    for name in [*columns, *(("hours", "GiB") if on_gpu else ())]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("perplexity", no_wrap=True)
    papers = sorted({row["published"]["source"] for row in rows if row["published"]})
    for row in rows:
        published = row["published"]
        on_paper = published and f"{published['perplexity']} ({papers.index(published['source']) + 1})"
        table.add_row(
            row["recipe"],
            "" if row["rank"] is None else str(row["rank"]),
            _short(row["parameters"]),
            *(() if same else (_short(row["tokens"]),)),
            _short(row["tokens_per_parameter"]),
            f"{row['flops']:.1e}".replace("e+", "e"),
            f"{row['learning_rate']:g}",
            *((f"{row['hours']:,.2f}", f"{row['bytes_per_gpu'] / GIB:,.0f}") if on_gpu else ()),
            (on_paper or "").replace(" to ", "-"),
        )
    out.print(table)
    if result["records"]:
        _show_records(result["records"])
    if on_gpu:
        out.print(
            f"{budget['gpus']} x {budget['gpu']} at {budget['mfu']:.0%} of its peak by the datasheet"
            + (", which no training reaches: --mfu says what yours does" if budget["mfu"] == 1 else ""),
        )
    for number_, paper in enumerate(papers, start=1):
        out.print(f"({number_}) as printed in {paper}")
    for source in result["sources"]:
        out.print(source, style="dim")
    out.print(f"The first of them: {rows[0]['command']}")


def _short(count: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def _show_records(records: list[dict[str, Any]]) -> None:
    title = "on record in your studies: loss on test text"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("corpus", "size", "method", "params", "tokens", "rate", "loss", "95 % interval", "seeds"):
        table.add_column(name, justify="left" if name in ("corpus", "size", "method") else "right", no_wrap=True)
    for row in records:
        loss = row["loss"]
        table.add_row(
            *(row[name] for name in ("corpus", "size", "method")),
            _short(row["parameters"]),
            _short(row["tokens"]),
            f"{row['learning_rate']:g}",
            f"{loss['mean']:.4f}",
            "" if loss["ci_low"] is None else f"{loss['ci_low']:.4f}-{loss['ci_high']:.4f}",
            str(loss["seeds"]),
        )
    console().print(table)
