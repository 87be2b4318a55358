"""`foldrank evaluate`: loss, perplexity and bits per byte of a checkpoint."""

import argparse
import math
from typing import Any

from foldrank.commands.arguments import whole_number, with_notes
from foldrank.commands.checkpoint_arguments import (
    add_checkpoint_arguments,
    add_device_argument,
    device_of,
    is_exported,
)

OF_DATA = ("text_field", "subset", "split")
"""Options that say something of `--data`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command line."""
    parser.description = (
        "Loss, perplexity and bits per byte of a checkpoint, weighted by tokens. Without --data: on the validation "
        "text of the run that it came from, as much of it as the run used."
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("--data", metavar="SOURCE", help="a source of text, as for `foldrank prepare`: all of it")
    parser.add_argument("--text-field", metavar="NAME", help="of --data: the field of the text in records")
    parser.add_argument("--subset", metavar="NAME", help="of --data: configuration of a Hugging Face data set")
    parser.add_argument("--split", metavar="NAME", help="of --data: split of a Hugging Face data set (default: train)")
    parser.add_argument(
        "--sequence-length", type=whole_number(2, 1 << 20), metavar="N", help="tokens per sequence (default: the run's)"
    )
    parser.add_argument(
        "--tasks",
        metavar="NAMES",
        help="benchmarks through lm-eval instead, by commas: stdlib_next_line and stdlib_summary, which ship, YAML "
        "files of tasks, and lm-eval's own by name (docs/evaluation.md)",
    )
    parser.add_argument(
        "--limit", type=whole_number(1, 1 << 30), metavar="N", help="of --tasks: examples of each at most"
    )
    parser.add_argument(
        "--legacy",
        action="store_true",
        help="also the number that published tables hold: mean of batch means over n + 1 (docs/perplexity.md)",
    )
    parser.add_argument(
        "--batch-size", type=whole_number(1, 1 << 16), metavar="N", default=16, help="sequences at a time (default: 16)"
    )
    add_device_argument(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Evaluates."""
    from foldrank.data.config import DataConfig
    from foldrank.data.stream import encode
    from foldrank.hf.checkpoint import check, load
    from foldrank.hf.foreign import foreign
    from foldrank.hf.token_bytes import bytes_per_token
    from foldrank.hf.tokenizers import load_tokenizer
    from foldrank.train.evaluate import by_source, check_fits, evaluate_loss
    from foldrank.train.run_folder import find_run

    notes: list[str] = []
    of_data = {name: value for name in OF_DATA if (value := getattr(arguments, name)) is not None}
    if of_data and arguments.data is None:
        raise ValueError(f"--{next(iter(of_data)).replace('_', '-')} says something of --data: name that too")
    if arguments.tasks is not None:
        return _tasks(arguments)
    if arguments.limit is not None:
        raise ValueError("--limit says something of --tasks: name those too")
    if not (exported := is_exported(arguments)):
        check(arguments.checkpoint)
    run = find_run(arguments.checkpoint)
    if run is None and arguments.data is None:
        raise ValueError(
            f"{arguments.checkpoint}: there is no run's config.yaml that foldrank wrote there or above, so its "
            "validation text is unknown: name a text with --data"
        )
    device = device_of(arguments)
    if exported:
        from foldrank.export.exported_model import ExportedModel

        model: Any = ExportedModel(arguments.checkpoint)
        tokenizer = load_tokenizer(arguments.checkpoint)
    else:
        model, tokenizer = load(arguments.checkpoint, accept_changes=arguments.accept_changes, tell=notes.append)
        model.to(device)
    trained_length = None if run is None else run.read_config().recipe.train.sequence_length
    length = arguments.sequence_length or trained_length or 256
    if not exported and (told := check_fits(model, tokenizer, length)):
        notes.append(told)
    if arguments.data is not None:
        sequences = encode(DataConfig(source=arguments.data, **of_data), tokenizer, length)
    else:
        assert run is not None  # refused above
        sequences = run.validation(tokenizer, length)
    with foreign(f"{arguments.checkpoint} cannot be evaluated"):
        token_bytes = bytes_per_token(tokenizer)
        result = evaluate_loss(model, sequences, batch_size=arguments.batch_size, token_bytes=token_bytes)
    if not math.isfinite(result.loss):
        raise ValueError(f"{arguments.checkpoint}: the loss is {result.loss}: its weights hold NaN or infinity")
    parts = by_source(result, sequences)
    legacy = {"legacy_perplexity": result.legacy_perplexity(arguments.batch_size), "batch_size": arguments.batch_size}
    figures = {
        "checkpoint": str(arguments.checkpoint),
        "data": arguments.data or f"the validation text of {run and run.path}",
        "sequence_length": length,
        "tokens": result.tokens,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        **({"loss_by_source": {name: part.loss for name, part in parts.items()}} if parts else {}),
        **(legacy if arguments.legacy else {}),
    }
    return with_notes(figures, notes)


def _tasks(arguments: argparse.Namespace) -> dict[str, Any]:
    from foldrank.hf.checkpoint import load
    from foldrank.tasks.harness import evaluate_tasks

    others = ("data", "sequence_length", "legacy")
    if given := [name for name in others if getattr(arguments, name) not in (None, False)]:
        raise ValueError(f"--{given[0].replace('_', '-')} says nothing of --tasks: leave one of them out")
    if not (names := [name for name in arguments.tasks.split(",") if name]):
        raise ValueError("--tasks names none")
    notes: list[str] = []
    device = device_of(arguments)
    model, tokenizer = load(arguments.checkpoint, accept_changes=arguments.accept_changes, tell=notes.append)
    model.to(device)  # pyright: ignore[reportArgumentType]
    scores = evaluate_tasks(model, tokenizer, names, batch_size=arguments.batch_size, limit=arguments.limit)
    result = {"checkpoint": str(arguments.checkpoint), "tasks": [score.to_dict() for score in scores]}
    return with_notes(result, notes)


def _show_tasks(result: dict[str, Any]) -> None:
    from rich.table import Table

    from foldrank.console import console

    out, table = console(), Table()
    out.print(result["checkpoint"], highlight=False, soft_wrap=True)
    for column in ("task", "metric", "score", "standard error", "chance", "examples"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for score in result["tasks"]:
        numbers = [score[name] for name in ("value", "standard_error", "chance")]
        shown = ["" if number is None else f"{number:.4f}" for number in numbers]
        table.add_row(score["task"], score["metric"], *shown, f"{score['examples']:,}")
    out.print(table)


def show(result: dict[str, Any]) -> None:
    """Says the figures."""
    if "tasks" in result:
        _show_tasks(result)
        return
    print(f"{result['checkpoint']} on {result['data']}")
    bits = result["bits_per_byte"]
    figures = [f"loss {result['loss']:.6f}", f"perplexity {result['perplexity']:.4f}"]
    figures += [] if bits is None else [f"bits per byte {bits:.4f}"]
    print(f"{'  '.join(figures)}  over {result['tokens']:,} tokens")
    for source, loss in result.get("loss_by_source", {}).items():
        print(f"  {source}: loss {loss:.6f}")
    if "legacy_perplexity" in result:
        print(
            f"as published tables compute it, in batches of {result['batch_size']}: {result['legacy_perplexity']:.4f} "
            "(not comparable across batch sizes)"
        )
