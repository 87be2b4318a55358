"""Runs the runs of a study, one after another; any number of processes may do so on one folder, on any machine.

A run belongs to the process that holds its lease (lease.py), which ends with the process, in whatever way. What a
killed process has begun, the next one goes on with, from the run's last checkpoint.
"""

import gc
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from foldrank.compare.lease import lease
from foldrank.compare.plan import Run, expected, planned, recipe_of, stopped_folders, total
from foldrank.compare.progress import loss_at
from foldrank.compare.records import Record, read_records, write_record
from foldrank.compare.study import Study
from foldrank.finetune.finetune import finetune
from foldrank.finetune.folder import FinetuneFolder
from foldrank.hf.checkpoint import load
from foldrank.recipes.reading import diff
from foldrank.recipes.schema import Recipe
from foldrank.structured import read_json_table
from foldrank.train.metrics import RunMetrics
from foldrank.train.pretrain import PausedRunError, pretrain
from foldrank.train.run_folder import RunFolder
from foldrank.train.safe_checkpoints import DivergedError
from foldrank.train.spectra import spectra

PASSING = (RuntimeError, MemoryError)
"""What may go as it came, such as memory that another process had for a while."""

SECONDS_TO_WAIT = 1.0
"""For the runs that other processes hold and that decide what comes next."""


def work(study: Study, folder: Path, report: Callable[[str], None], *, expiry: float) -> None:
    """Runs what the study still needs, until nothing is left, also by other processes.

    Args:
        study: what is asked.
        folder: the study's folder.
        report: is told a line about each run that ends.
        expiry: seconds after which the run of a process on another machine that does not answer is taken over.

    Raises:
        ValueError: where a record or an unfinished run in the folder is of other settings.
        OSError: where something cannot be written.
        InterruptedRunError: after SIGTERM or SIGINT, with a checkpoint saved.
    """
    given_up: set[str] = set()
    while todo := [run for run in planned(study, read_records(folder)) if run.id not in given_up]:
        if not any(_tried(study, run, folder, report, given_up, expiry) for run in todo):
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
        absent = set(study.finetune) - set(records[run.id].finetuned)
        if absent and run.stage == "final" and records[run.id].finished:
            raise ValueError(
                f"{folder / 'records' / run.id}.json is without the fine-tuning {min(absent)!r}: choose another "
                "folder, or delete the record"
            )
        if changed := diff(Recipe.from_dict(records[run.id].recipe), recipe_of(study, run)):
            raise ValueError(
                f"{folder / 'records' / run.id}.json is of other settings than the study now: {changed[0]}. Choose "
                "another folder, or delete the record"
            )


def _tried(
    study: Study, run: Run, folder: Path, report: Callable[[str], None], given_up: set[str], expiry: float
) -> bool:
    """Runs `run`; False where another process holds it."""
    runs = folder / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    with lease(runs, run.folder, expiry) as mine:
        if not mine:
            return False
        records = read_records(folder)
        if run.id in records:
            return True
        began = time.perf_counter()
        try:
            record = _run(study, run, runs / run.folder, records, began)
        except PASSING as error:
            # Perhaps another process had the memory: no result of the method, and tried again.
            given_up.add(run.id)
            _free_memory()
            report(f"{run.id}  not finished, the same command tries it again: {_line(error)}")
            return True
        write_record(folder, record)
        _clean(runs / run.folder, record)
        records = read_records(folder)
        for stopped in stopped_folders(study, records):
            shutil.rmtree(runs / stopped, ignore_errors=True)
        done = sum(other.stage != "rung" for other in records.values())
        outcome = record.error or f"validation loss {record.loss:.4f}"
        seconds = time.perf_counter() - began
        report(f"{done} of {max(done, total(study))}  {run.id}  {outcome}  ({seconds:.0f} s)")
        return True


def _run(study: Study, run: Run, out: Path, others: Mapping[str, Record], began: float) -> Record:
    recipe, folder = recipe_of(study, run), RunFolder(out)
    record = Record(id=run.id, recipe=recipe.to_dict(), **asdict(run))
    if run.until is not None and (known := loss_at(folder.log, run.until)) is not None:
        return replace(record, val_loss=known)  # the process was killed before it wrote the record
    begun = folder.is_run() and not folder.metrics.exists()
    if begun:
        folder.find_checkpoint(recipe, resume=True)  # what is wrong with the folder is no result of the method
    try:
        if folder.metrics.exists():
            metrics = RunMetrics.read(folder.metrics)
        else:
            metrics = pretrain(recipe, out, name=run.folder, quiet=True, resume=begun, pause_after=run.until)
    except PausedRunError as paused:
        return replace(record, val_loss=paused.val_loss)
    except ValueError as error:
        # What a method does is a result: a loss that is not finite.
        _free_memory()
        return replace(record, error=_line(error))
    record = replace(record, metrics=replace(metrics, study_seconds=time.perf_counter() - began))
    _check_text(record, others)
    if run.stage == "final":
        record = replace(record, finetuned={name: _finetuned(study, name, run, folder) for name in study.finetune})
    first = run.stage == "final" and run.seed == study.seeds_of(study.method(run.method))[0]
    return replace(record, spectra=spectra(load(folder.folded)[0])) if first else record


def _finetuned(study: Study, name: str, run: Run, folder: RunFolder) -> dict[str, Any]:
    out, settings = folder.path / f"finetuned-{name}", study.finetuning(name, seed=run.seed)
    tuned = FinetuneFolder(out)
    if tuned.metrics.exists():
        return read_json_table(tuned.metrics)
    begun = tuned.is_run()
    try:
        return finetune(folder.folded, settings, out, resume=begun, quiet=True).to_dict()
    except DivergedError as error:  # as of a run: what a method does is a result
        _free_memory()
        return {"error": _line(error)}


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_corpus(corpus: str, text_sha256: str, folder: Path) -> None:
    """Refuses a corpus that is not what the runs in the folder were trained on, before any work.

    Raises:
        ValueError: naming both hashes.
    """
    for record in read_records(folder).values():
        then = record.measured.text_sha256 if record.finished and record.corpus == corpus else None
        if then is not None and then != text_sha256:
            raise ValueError(
                f"the text of the corpus {corpus!r} is not what it was for {record.id} (its sha256 was {then[:12]} and "
                f"is {text_sha256[:12]}): restore it, or begin the study anew in another folder"
            )


def _check_text(record: Record, others: Mapping[str, Record]) -> None:
    """Runs that did not train on the same text are not compared."""
    for other in others.values():
        if record.finished and other.finished and other.corpus == record.corpus:
            for what in ("text_sha256", "tokenizer_sha256"):
                then, now = getattr(other.measured, what), getattr(record.measured, what)
                if then is not None and now is not None and then != now:
                    raise ValueError(
                        f"the text of the corpus {record.corpus!r} is not what it was for {other.id} ({what} was "
                        f"{then[:12]} and is {now[:12]}): restore it and delete the folder of the run {record.id}, or "
                        "begin the study anew in another folder"
                    )


def _clean(out: Path, record: Record) -> None:
    """Keeps of a run what can still be of use: all of one that failed, the folded model of one that is compared."""
    if record.finished:
        for part in ("checkpoints", "unfolded", *(("folded",) if record.stage == "sweep" else ())):
            shutil.rmtree(out / part, ignore_errors=True)
        for tuned in out.glob("finetuned-*"):
            shutil.rmtree(tuned, ignore_errors=True)
