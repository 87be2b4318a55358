"""`foldrank prepare`: text to a folder of tokens that training reads."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldrank.commands.progress import PreparationProgressBar
from foldrank.commands.recipe_arguments import setting_type
from foldrank.data.config import EXPORT_FORMATS, DataConfig
from foldrank.recipes.schema import Recipe, field_help

if TYPE_CHECKING:
    from foldrank.data.shares import Share

NOT_HERE = ("source", "sources", "stream")
"""Settings of the data that are no options of this command."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command line."""
    parser.description = (
        "Tokenize text once into a folder that `foldrank pretrain RECIPE --data.source DIR` reads, for every layout "
        "and sequence length. Interrupted, the same command goes on where it was; under torchrun its processes share "
        "the work, on any number of machines that see the folder."
    )
    settings = _settings()
    parser.add_argument("source", metavar="SOURCE", help=settings["source"].rpartition("; or")[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder for the prepared data")
    parser.add_argument("--check", action="store_true", help="read a sample of every file, say what is there, and stop")
    parser.add_argument("--verify", action="store_true", help="SOURCE is a prepared folder: compare its checksums")
    parser.add_argument(
        "--export",
        choices=EXPORT_FORMATS,
        help="SOURCE is a prepared folder: write its tokens into --out as others read them: Megatron's .bin and .idx, "
        "raw .bin as in nanoGPT, or .parquet with input_ids",
    )
    for name, meaning in settings.items():
        if name not in NOT_HERE:
            parser.add_argument(
                f"--{name.replace('_', '-')}",
                dest=name,
                type=setting_type(f"data.{name}"),
                default=argparse.SUPPRESS,
                metavar="VALUE",
                help=meaning.replace("%", "%%"),
            )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prepares, or verifies what was prepared."""
    given = {f"data.{name}": vars(arguments)[name] for name in _settings() if name in vars(arguments)}
    if arguments.verify:
        return _verify(arguments, given)
    if arguments.export:
        return _export(arguments, given)
    config = Recipe().override(given).data
    if arguments.check:
        return _check(config)
    if arguments.out is None:
        raise ValueError("--out is missing: name a new folder for the prepared data")
    from foldrank.data.prepare import prepare

    began = time.perf_counter()
    try:
        with PreparationProgressBar() as progress:
            data = prepare(config, arguments.out, progress, share=_share())
    except KeyboardInterrupt:
        partial = arguments.out.with_name(f"{arguments.out.name}.partial")
        done = (
            f"what is done is kept in {partial}: the same command goes on there"
            if partial.exists()
            else "nothing is kept"
        )
        print(f"foldrank prepare: interrupted; {done}", file=sys.stderr)
        raise SystemExit(130) from None
    return {"out": str(arguments.out), "seconds": time.perf_counter() - began, **_summary(data)}


def _share() -> "Share":
    """Of this process, as torchrun says it."""
    from foldrank.data.shares import Share

    return Share(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def show(result: dict[str, Any]) -> None:
    """Prints a table."""
    if "kinds" in result:
        _show_check(result)
        return
    if "exported" in result:
        print(f"{result['out']}: {', '.join(result['exported'])}; ids of type {result['dtype']}")
        return
    from rich.table import Table

    from foldrank.console import console

    title = f"{result['out']}: every file is as it was prepared" if "verified" in result else result["out"]
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column()
    table.add_row("source", result["source"])
    unnamed = "trained on this text" if result["token_format"] is None else "unknown: ids are spelled as numbers"
    table.add_row("tokenizer", f"{result['tokenizer'] or unnamed}, {result['vocab_size']:,} entries")
    for split, counts in result["splits"].items():
        table.add_row(split, f"{counts['documents']:,} documents, {counts['tokens']:,} tokens")
    table.add_row("read", f"{result['bytes_read']:,} bytes, of which {result['bytes_lost']:,} were no text")
    table.add_row("left out", _left_out(result))
    table.add_row("size", f"{result['bytes']:,} bytes")
    if "seconds" in result:
        table.add_row("seconds", f"{result['seconds']:.1f}")
    console().print(table)


def _check(config: DataConfig) -> dict[str, Any]:
    from foldrank.data.corpus import sample

    samples, tally = sample(config)
    kinds: dict[str, dict[str, int]] = {}
    for one in samples:
        row = kinds.setdefault(one.kind or "unreadable", dict.fromkeys(COUNTS, 0))
        for name, count in zip(COUNTS, (1, one.bytes, one.documents, one.tally.lost_bytes), strict=True):
            row[name] += count
    skipped = sum((one.tally.skipped for one in samples), tally.skipped)
    problems = [f"{one.path}: {one.error}" for one in samples if one.error is not None]
    return {"source": config.source, "kinds": kinds, "skipped": dict(sorted(skipped.items())), "problems": problems}


COUNTS = ("files", "bytes", "documents sampled", "bytes lost")


def _show_check(result: dict[str, Any]) -> None:
    from rich.table import Table

    from foldrank.console import console, one_line

    out, table = console(soft_wrap=True), Table(title=result["source"], title_justify="left")
    for name, justify in (("", "left"), *((name, "right") for name in COUNTS)):
        table.add_column(name, justify=justify)  # pyright: ignore[reportArgumentType]
    for kind, counts in result["kinds"].items():
        table.add_row(kind, *(f"{count:,}" for count in counts.values()))
    out.print(table)
    out.print(f"left out: {_left_out(result)}")
    for problem in result["problems"][:10]:
        out.print(one_line(f"would stop: {problem}"))


def _left_out(result: dict[str, Any]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in result["skipped"].items()) or "nothing"


def _verify(arguments: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    if arguments.out is not None or len(given) > 1:
        raise ValueError("--verify only reads the folder: give no other setting")
    from foldrank.data.prepared import PreparedData

    data = PreparedData(Path(arguments.source))
    data.verify()
    return {"out": arguments.source, "verified": True, **_summary(data)}


def _export(arguments: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    if arguments.out is None:
        raise ValueError("--out is missing: name a new folder for the exported tokens")
    if len(given) > 1:
        raise ValueError("--export writes what a prepared folder holds: give no setting of the data")
    from foldrank.data.prepared import PreparedData
    from foldrank.data.token_export import export_tokens

    data = PreparedData(Path(arguments.source))
    files = export_tokens(data, arguments.export, arguments.out)
    return {
        "source": arguments.source,
        "out": str(arguments.out),
        "exported": [file.name for file in files],
        "dtype": data.dtype.name,
    }


def _summary(data: Any) -> dict[str, Any]:
    manifest = data.manifest
    splits = manifest.splits.items()
    return {
        "source": manifest.config.source,
        "token_format": manifest.config.token_format,
        "tokenizer": manifest.tokenizer.name,
        "vocab_size": manifest.vocab_size,
        "splits": {split: {"documents": part.documents, "tokens": part.tokens} for split, part in splits},
        "bytes_read": manifest.bytes_read,
        "bytes_lost": manifest.bytes_lost,
        "skipped": dict(manifest.skipped),
        "bytes": sum(file.stat().st_size for file in data.folder.rglob("*") if file.is_file()),
    }


def _settings() -> dict[str, str]:
    return {name.removeprefix("data."): meaning for name, meaning in field_help().items() if name.startswith("data.")}
