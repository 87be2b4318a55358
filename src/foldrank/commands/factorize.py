"""`foldrank factorize`: a dense checkpoint at low rank, and what that costs before any training."""

import argparse
from pathlib import Path
from typing import Any

from foldrank.commands.arguments import number, whole_number, with_notes
from foldrank.commands.checkpoint_arguments import add_checkpoint_arguments, add_device_argument, device_of
from foldrank.core.config import ACTIVATIONS

INITS = ("svd", "activations", "regression")
ALLOCATIONS = ("even", "spectra")

RECIPE = "recipe.yaml"
"""Beside a checkpoint made of a run's: the run's recipe with the ranks of the checkpoint."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command line."""
    parser.description = (
        "The best approximation of each weight of a dense checkpoint at low rank: the loss by rank before any "
        "training, and with --out the low-rank checkpoint, from which `foldrank pretrain --init-from` goes on "
        "(docs/from-dense.md)."
    )
    add_checkpoint_arguments(parser, "folder of a dense checkpoint")
    parser.add_argument(
        "--rank", type=whole_number(1, 1 << 20), metavar="N", nargs="+", default=[], help="one rank or several"
    )
    parser.add_argument(
        "--budget",
        type=number(0, 1),
        metavar="SHARE",
        nargs="+",
        default=[],
        help="shares of the dense model's parameters to keep, such as 0.6, in place of ranks or beside them",
    )
    parser.add_argument(
        "--allocation",
        choices=ALLOCATIONS,
        nargs="+",
        default=list(ALLOCATIONS),
        help="even: of a budget each layer gets the same share of its full rank; spectra: ranks by the singular values "
        "(default: both)",
    )
    parser.add_argument(
        "--init",
        choices=INITS,
        nargs="+",
        help="svd: nearest to the weight; activations: nearest to its outputs on a sample (default: both); regression: "
        "near to them, with --activation (the default there)",
    )
    parser.add_argument("--activation", choices=ACTIVATIONS, help="between the factors, such as CoLA's silu")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder for the one model that is asked for")
    parser.add_argument("--data", metavar="SOURCE", help="a text to evaluate on (default: the run's validation text)")
    parser.add_argument(
        "--sample", metavar="SOURCE", help="a text to approximate on (default: the run's training text)"
    )
    parser.add_argument(
        "--sample-sequences",
        type=whole_number(1, 1 << 20),
        metavar="N",
        default=64,
        help="sequences of the sample (default: 64)",
    )
    parser.add_argument(
        "--sequence-length", type=whole_number(2, 1 << 20), metavar="N", help="tokens per sequence (default: the run's)"
    )
    parser.add_argument(
        "--batch-size", type=whole_number(1, 1 << 16), metavar="N", default=16, help="sequences at a time (default: 16)"
    )
    add_device_argument(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Approximates and evaluates."""
    from dataclasses import asdict, replace

    from foldrank.atomic import refuse_existing, write_text
    from foldrank.data.config import DataConfig
    from foldrank.data.stream import encode
    from foldrank.hf.checkpoint import inspect, load
    from foldrank.structured import to_yaml
    from foldrank.surgery.factorize import describe
    from foldrank.train.evaluate import evaluate_loss, first
    from foldrank.train.factorization import Target, approximations, batches, training_sample
    from foldrank.train.run_folder import find_run, save

    folder, activation = arguments.checkpoint, arguments.activation
    inits: list[Any] = list(dict.fromkeys(arguments.init or (["regression"] if activation else ["svd", "activations"])))
    if any((init == "regression") != (activation is not None) for init in inits):
        raise ValueError("--init regression goes with --activation, and svd and activations without")
    if (state := inspect(folder).state) != "dense":
        raise ValueError(f"{folder} is low-rank already ({state}): factorize takes a dense checkpoint")
    targets = [Target(rank=rank) for rank in arguments.rank]
    allocations = dict.fromkeys(arguments.allocation)
    targets += [Target(budget=share, allocation=each) for share in arguments.budget for each in allocations]
    if not targets:
        raise ValueError("give the size: --rank 16, or --budget 0.6 for a share of the parameters")
    if arguments.out is not None and len(targets) * len(inits) != 1:
        raise ValueError("--out takes one model: name one --rank, or one --budget and its --allocation, and one --init")
    if arguments.out is not None:
        refuse_existing(arguments.out, option="--out")
    run = find_run(folder)
    sampled = inits != ["svd"]
    if run is None and (arguments.data is None or (sampled and arguments.sample is None)):
        raise ValueError(
            f"{folder} lies in no run, so its texts are unknown: name --data, and --sample for all but svd"
        )
    notes: list[str] = []
    device, size = device_of(arguments), arguments.batch_size
    dense, tokenizer = load(folder, accept_changes=arguments.accept_changes, tell=notes.append)
    length = arguments.sequence_length or (run.read_config().recipe.train.sequence_length if run else 256)
    data, sample = (
        None if source is None else encode(DataConfig(source=source), tokenizer, length)
        for source in (arguments.data, arguments.sample)
    )
    if data is None:
        assert run is not None  # refused above
        data = run.validation(tokenizer, length)
    if sample is None and sampled:
        assert run is not None
        sample = training_sample(run, tokenizer, arguments.sample_sequences)
    chosen = [] if sample is None else batches(first(sample, arguments.sample_sequences), size, device)

    def again() -> Any:
        return load(folder, accept_changes=arguments.accept_changes)[0].to(device)  # pyright: ignore[reportArgumentType]

    def keep(model: Any) -> None:
        if arguments.out is not None:
            save(model, tokenizer, arguments.out)
            if run is not None:
                recipe = replace(run.read_config().recipe, low_rank=describe(model))
                write_text(arguments.out / RECIPE, to_yaml(recipe.to_dict()))

    before = evaluate_loss(dense.to(device), data, batch_size=size)  # pyright: ignore[reportArgumentType]
    parameters = dense.num_parameters()
    del dense
    rows = approximations(again, targets, inits, chosen, data, activation=activation, batch_size=size, keep=keep)
    return with_notes(
        {
            "checkpoint": str(folder),
            "data": arguments.data or f"the validation text of {run and run.path}",
            "tokens": before.tokens,
            "dense": {"parameters": parameters, "loss": before.loss},
            "approximations": [asdict(row) for row in rows],
            "out": None if arguments.out is None else str(arguments.out),
        },
        notes,
    )


def _size(target: dict[str, Any]) -> str:
    return str(target["rank"]) if target["budget"] is None else f"{target['budget']:.0%}, {target['allocation']}"


def show(result: dict[str, Any]) -> None:
    """Prints the losses by rank."""
    from rich.table import Table

    from foldrank.console import console

    out = console()
    inits = list(dict.fromkeys(row["init"] for row in result["approximations"]))
    title = f"{result['checkpoint']} at low rank, before any training: loss on {result['data']}"
    table = Table(title=title, title_justify="left")
    for column in ("rank", "parameters", *inits):
        table.add_column(column, justify="right")
    dense, rows = result["dense"], result["approximations"]
    table.add_row("dense", f"{dense['parameters']:,}", f"{dense['loss']:.4f}", end_section=True)
    for first in rows[:: len(inits)]:
        alike = {row["init"]: row for row in rows if row["target"] == first["target"]}
        losses = (f"{alike[init]['loss']:.4f}" for init in inits)
        table.add_row(_size(first["target"]), f"{first['parameters']:,}", *losses)
    out.print(table)
    if result["out"]:
        folder = Path(result["out"])
        recipe = folder / RECIPE if (folder / RECIPE).exists() else "RECIPE"
        out.print(f"{folder}: train on with foldrank pretrain {recipe} --init-from {folder}")
