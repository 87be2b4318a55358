"""`foldrank bench`: what methods cost beside one another on this machine."""

import argparse
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from foldrank.bench import BENCHMARKS, TRAINING
from foldrank.commands.arguments import number, whole_number

PAGE = Path("benchmarks/README.md")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Times methods interleaved in one process, and reports ratios to the first, round by round: median and\n"
        "quartiles. Nothing is reported of ways that should compute the same and do not."
    )
    parser.epilog = "benchmarks:\n" + "\n".join(f"  {name:8} {summary}" for name, summary in BENCHMARKS.items())
    parser.add_argument("benchmark", nargs="?", metavar="BENCHMARK", help="one of those below")
    parser.add_argument("--recipe", metavar="NAME", help="a low-rank recipe, for its sizes (default: demo)")
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="the baseline first: dense cola cola-dlr cola-dlr-latents ..."
    )
    for name, help_text in (
        ("layers", "blocks, in place of the recipe's"),
        ("vocabulary", "entries of embedding and head, in place of the recipe's"),
        ("batch-size", "sequences at a time (default: the recipe's; 1 to read and decode)"),
        ("sequence-length", "tokens of a sequence or a prompt (default: the recipe's)"),
        ("new-tokens", "decode: tokens after the prompt (default: 32)"),
        ("steps", "trainer: steps a round (default: 10)"),
        ("shards", "fold: files of the checkpoint (default: 4)"),
        ("rounds", "runs of each method (default: 20)"),
    ):
        parser.add_argument(f"--{name}", type=whole_number(0, 1 << 30), metavar="N", help=help_text)
    most = 4 * (os.cpu_count() or 1)
    parser.add_argument(
        "--threads", type=whole_number(1, most), metavar="N", help="threads of the CPU (default: PyTorch's choice)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", help="float32 or bfloat16 (default: float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument("--profile", action="store_true", help="keep where the time of one more run of each goes")
    parser.add_argument("--note", metavar="TEXT", help="a remark to stand below the record's table")
    parser.add_argument(
        "--peak-flops",
        type=number(0),
        metavar="FLOPS",
        help="of the device, without sparsity: step then says its share (MFU)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep a record here, such as benchmarks/records")
    parser.add_argument(
        "--report",
        type=Path,
        nargs="?",
        const=PAGE,
        metavar="PAGE",
        help=f"measure nothing: write the tables of PAGE (default: {PAGE}) anew, of the records beside it",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, or writes the tables."""
    import torch

    from foldrank.bench import record, report
    from foldrank.bench.settings import Settings
    from foldrank.train.malloc import apply_malloc_settings

    if arguments.report is not None:
        if arguments.benchmark is not None:
            raise ValueError("--report measures nothing: leave out the name of a benchmark, or --report")
        return {"page": str(arguments.report), "records": report.update(arguments.report)}
    if arguments.benchmark is None:
        raise ValueError(f"name a benchmark: {', '.join(BENCHMARKS)}; or --report for the tables")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    names = ("benchmark", "recipe", "methods", "layers", "vocabulary", "batch_size", "sequence_length", "new_tokens")
    names += ("steps", "shards", "rounds", "device", "dtype", "profile", "note", "peak_flops")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    settings = Settings(**given)
    for method in settings.method_names:
        settings.recipe_of(method)  # refuses what is unknown before anything slow begins
    if settings.device == "cpu" and settings.benchmark in TRAINING:
        apply_malloc_settings()
    measured = record.make_record(settings, import_module(f"foldrank.bench.{settings.benchmark}").run(settings))
    file = None if arguments.out is None else record.write_record(arguments.out, measured)
    return {**record.as_json(measured), "file": None if file is None else str(file)}


def show(result: dict[str, Any]) -> None:
    """Prints the table, or says what was written."""
    from foldrank.bench.record import from_json
    from foldrank.bench.report import describe, table

    if "page" in result:
        print(f"wrote the tables of {len(result['records'])} records into {result['page']}")
        return
    file = result.pop("file")
    measured = from_json(result)
    print(f"{describe(file or measured.settings['benchmark'], measured)}\n\n{table(measured)}", end="")
