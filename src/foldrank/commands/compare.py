"""`foldrank compare`: runs a study, or says what it will cost."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from foldrank.commands.arguments import number, whole_number
from foldrank.commands.progress import PreparationProgressBar
from foldrank.console import console

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What `torchrun` and `accelerate launch` tell their processes."""

LEASE_SECONDS = 60.0
"""Without an answer, after which a machine is taken to be gone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command line."""
    parser.description = (
        "Run a study: methods x corpora x sizes x learning rates x seeds on the same data in the same order. Started "
        "again on the same folder, also after it was killed, it goes on where it was; started several times at once, "
        "or by torchrun, its processes share the runs, each taking one device."
    )
    parser.add_argument("study", metavar="STUDY", help="a .yaml file, or the name of a shipped study: tiny")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the study's folder (default: studies/NAME)")
    parser.add_argument("--plan", action="store_true", help="say what the study will cost, and stop")
    parser.add_argument(
        "--workers",
        type=whole_number(1, 1024),
        default=1,
        metavar="N",
        help="processes that share the runs (default: 1)",
    )
    parser.add_argument(
        "--lease",
        type=number(0.1),
        default=LEASE_SECONDS,
        metavar="SECONDS",
        help=f"after which a run is taken over from a machine that does not answer (default: {LEASE_SECONDS:g})",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the study; returns where it lies and how its runs ended."""
    from foldrank.atomic import write_text
    from foldrank.compare.plan import planned, stopped_folders
    from foldrank.compare.records import read_records
    from foldrank.compare.study_file import WRITTEN_BY_US, check_folder, find_study, load_study
    from foldrank.compare.worker import check_corpus, check_records, work
    from foldrank.data.stream import open_data
    from foldrank.train.malloc import apply_malloc_settings
    from foldrank.train.pretrain import InterruptedRunError

    file = find_study(arguments.study)
    study = load_study(file)
    if arguments.plan:
        from foldrank.compare.cost import cost

        apply_malloc_settings()  # as the runs will
        return {"plan": cost(study, arguments.workers), "study": str(file)}
    out = arguments.out or Path("studies") / file.stem
    check_folder(out, file)
    check_records(study, out)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    lines = console(stderr=True, soft_wrap=True)
    apply_malloc_settings()
    with _alone(rank):
        with PreparationProgressBar() as progress:
            for corpus in study.corpora:
                data = open_data(study.recipe(corpus, next(iter(study.sizes)), study.methods[0]).data, progress)
                if (text_sha256 := data.text_sha256()) is not None:
                    check_corpus(corpus, text_sha256, out)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "study.yaml", WRITTEN_BY_US + study.to_yaml())
        try:
            if arguments.workers > 1:
                _run_workers(arguments.workers, [str(file), "--out", str(out), "--lease", str(arguments.lease)])
            else:
                work(study, out, lines.print, expiry=arguments.lease)
        except InterruptedRunError as stopped:
            print("foldrank compare: stopped; the same command goes on", file=sys.stderr)
            raise SystemExit(128 + stopped.signal_number) from stopped
    records = read_records(out)
    return {
        "study": str(out),
        "finished": sum(record.finished for record in records.values()),
        "failed": {name: record.error for name, record in records.items() if record.error is not None},
        "stopped": len(stopped_folders(study, records)),
        "missing": len(planned(study, records)),
    }


def show(result: dict[str, Any]) -> None:
    """Prints the plan, or how the runs ended."""
    out = console(soft_wrap=True)
    if "plan" in result:
        _show_plan(result["plan"], out)
        return
    stopped = f"{result['stopped']} stopped early, " if result["stopped"] else ""
    failed, missing = len(result["failed"]), result["missing"]
    out.print(f"{result['finished']} runs finished, {stopped}{failed} failed, {missing} missing")
    for name, error in result["failed"].items():
        out.print(f"failed: {name}: {error}")
    out.print(f"tables and pictures: foldrank report {result['study']}")


def _show_plan(plan: dict[str, Any], out: Any) -> None:
    table = Table(title=plan["title"], title_justify="left")
    for name, justify in (("size", "left"), ("method", "left"), *((name, "right") for name in COLUMNS)):
        table.add_column(name, justify=justify)  # pyright: ignore[reportArgumentType]
    for row in plan["rows"]:
        table.add_row(row["size"], row["method"], *(f"{row[name]:,.4g}" for name in COLUMNS))
    out.print(table)
    out.print(
        f"{plan['runs']} runs, more where a sweep is extended; {plan['tokens']:,} tokens, {plan['flops']:.3g} FLOPs. "
        f"About {plan['minutes']:.0f} minutes here with {plan['workers']} at a time, by the time that a few steps of "
        "each method took just now; evaluations are counted as training, preparing the data is not."
    )


COLUMNS = ("runs", "parameters", "tokens", "FLOPs", "seconds a step", "minutes")


@contextmanager
def _alone(rank: int) -> Iterator[None]:
    """Each process trains by itself on a device of its own, whatever launcher started it."""
    hidden = {name: os.environ.pop(name) for name in LAUNCHER if name in os.environ}
    if hidden and "CUDA_VISIBLE_DEVICES" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(rank)
    try:
        yield
    finally:
        os.environ.update(hidden)


def _run_workers(workers: int, arguments: list[str]) -> None:
    """Starts this command in several processes, each with its share of the cores, or a GPU, and waits for them."""
    import torch

    gpus = torch.cuda.device_count()
    started = []
    for worker in range(workers):
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(worker % gpus)
        command = [sys.executable, "-m", "foldrank.cli", "compare", *arguments]
        started.append(subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL))
    try:
        with _passed_on(started):
            codes = [process.wait() for process in started]
    finally:
        for process in started:
            process.terminate()
    if any(codes):
        raise SystemExit(next(code if code > 0 else 128 - code for code in codes if code))


@contextmanager
def _passed_on(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """SIGTERM and SIGINT go on to the processes, which save and stop."""

    def pass_on(number: int, frame: object) -> None:  # noqa: ARG001
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
