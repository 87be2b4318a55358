"""Runs the runs of a study, one after another; any number of processes may do so on one folder.

A run belongs to the process that holds the lock `runs/ID.lock`, which the system takes back when the process ends, in
whatever way. What a killed process has begun, the next one goes on with, from the run's last checkpoint.
"""

import gc
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from foldrank.compare.plan import Run, expected, planned, recipe_of, total
from foldrank.compare.records import Record, read_records, write_record
from foldrank.compare.spectra import spectra
from foldrank.compare.study import Study
from foldrank.hf.checkpoint import load
from foldrank.recipes.reading import diff
from foldrank.recipes.schema import Recipe
from foldrank.train.pretrain import find_checkpoint, pretrain

SECONDS_TO_WAIT = 1.0
"""For the runs that other processes hold and that decide what comes next."""


def work(study: Study, folder: Path, say: Callable[[str], None]) -> None:
    """Runs what the study still needs, until nothing is left, also by other processes.

    Args:
        study: what is asked.
        folder: the study's folder.
        say: is told a line about each run that ends.

    Raises:
        ValueError: where a record or an unfinished run in the folder is of other settings.
        OSError: where something cannot be written.
        InterruptedRunError: after SIGTERM or SIGINT, with a checkpoint saved.
    """
    while todo := planned(study, read_records(folder)):
        if not any(_tried(study, run, folder, say) for run in todo):
            time.sleep(SECONDS_TO_WAIT)


def check_records(study: Study, folder: Path) -> None:
    """Refuses a folder whose records are of other settings than the study asks for now.

    Raises:
        ValueError: naming the first such record.
    """
    records = read_records(folder)
    for run in expected(study, records):
        if run.id not in records:
            continue
        if changed := diff(Recipe.from_dict(records[run.id].recipe), recipe_of(study, run)):
            raise ValueError(
                f"{folder / 'records' / run.id}.json is of other settings than the study now: {changed[0]}. Choose "
                "another folder, or delete the record"
            )


def _tried(study: Study, run: Run, folder: Path, say: Callable[[str], None]) -> bool:
    """Runs `run`; False where another process holds it."""
    runs = folder / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(runs / f"{run.id}.lock").acquire(blocking=False):
            records = read_records(folder)
            if run.id not in records:
                began = time.perf_counter()
                record = _run(study, run, runs / run.id, began)
                _check_text(record, records)
                write_record(folder, record)
                _clean(runs / run.id, record)
                done = len(read_records(folder))
                loss = record.metrics.get("val_loss_folded")
                outcome = record.error if loss is None else f"validation loss {loss:.4f}"
                seconds = time.perf_counter() - began
                say(f"{done} of {max(done, total(study))}  {run.id}  {outcome}  ({seconds:.0f} s)")
            return True
    except Timeout:
        return False


def _run(study: Study, run: Run, out: Path, began: float) -> Record:
    recipe = recipe_of(study, run)
    record = Record(id=run.id, recipe=recipe.to_dict(), **asdict(run))
    finished, begun = (out / "metrics.json").exists(), (out / "config.yaml").exists()
    if begun and not finished:
        find_checkpoint(recipe, out, resume=True)  # what is wrong with the folder is no result of the method
    try:
        if finished:
            metrics = json.loads((out / "metrics.json").read_text())
        else:
            metrics = pretrain(recipe, out, name=run.id, quiet=True, resume=begun)
    except (ValueError, RuntimeError, MemoryError) as error:
        # What a method does is a result: a loss that is not finite, a model that memory does not hold.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return replace(record, error=" ".join(f"{type(error).__name__}: {error}".split()))
    metrics["study_seconds"] = time.perf_counter() - began
    first = run.stage == "final" and run.seed == study.seeds_of(study.method(run.method))[0]
    return replace(record, metrics=metrics, spectra=spectra(load(out / "folded")[0]) if first else {})


def _check_text(record: Record, others: Mapping[str, Record]) -> None:
    """Runs that did not train on the same text are not compared."""
    for other in others.values():
        if record.finished and other.finished and other.corpus == record.corpus:
            if other.metrics["text_sha256"] != record.metrics["text_sha256"]:
                raise ValueError(
                    f"the text of the corpus {record.corpus!r} is not what it was for {other.id}: restore it and "
                    f"delete the folder of the run {record.id}, or begin the study anew in another folder"
                )
            return


def _clean(out: Path, record: Record) -> None:
    """Keeps of a run what can still be of use: all of one that failed, the folded model of one that is compared."""
    if record.finished:
        for part in ("checkpoints", "unfolded", *(("folded",) if record.stage == "sweep" else ())):
            shutil.rmtree(out / part, ignore_errors=True)
