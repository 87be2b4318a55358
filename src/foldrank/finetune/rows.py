"""Where examples come from: each source becomes rows with fields by name, parted into training and held out."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from foldrank.data import files
from foldrank.data.files import Tally, ending_of
from foldrank.extras import needed
from foldrank.finetune import stdlib_tasks
from foldrank.finetune.settings import FinetuneSettings
from foldrank.hf.foreign import foreign


class Row(dict[str, Any]):
    """Fields by name, and which example of which source they are."""

    def __init__(self, fields: Mapping[str, Any], number: int, source: str | Path) -> None:
        super().__init__(fields)
        self.where = f"example {number} of {source}"


GLUE = "nyu-mll/glue"

GLUE_TASKS = ("cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "wnli")
"""Without stsb, whose labels are numbers, and ax, which has no training examples."""

HELD_OUT_SPLITS = ("validation", "validation_matched", "dev", "test")
"""Splits of a data set, the first one that it has."""

TABLES = {".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Examples as they were read."""

    training: list[Row]
    held_out: list[Row]
    label_names: tuple[str, ...] | None = None
    """Of labels that are numbers, where the data set names them."""
    sha256: str
    """Of all examples: what the run was trained and measured on."""


def read_rows(settings: FinetuneSettings) -> Rows:
    """The examples that the settings name.

    Raises:
        ValueError: for a source that does not exist or cannot be read, or of which nothing is held out.
    """
    names: tuple[str, ...] | None = None
    if settings.data in stdlib_tasks.SHIPPED:
        task = stdlib_tasks.SHIPPED[settings.data]
        if settings.task != task:
            raise ValueError(f"{settings.data} is a task of {task}, and task is {settings.task}: give --task {task}")
        shipped, keys = zip(*stdlib_tasks.rows(settings.data), strict=True)
        training, held_out = _parted(
            zip(_numbered(shipped, settings.data), keys, strict=True), settings.held_out_fraction
        )
    elif Path(settings.data).is_file():
        training, held_out = _parted(
            ((row, _key(row)) for row in _file_rows(Path(settings.data))), settings.held_out_fraction
        )
    else:
        training, held_out, names = _data_set(settings.data)
        if not held_out:
            training, held_out = _parted(((row, _key(row)) for row in training), settings.held_out_fraction)
    if settings.held_out is not None:
        if not Path(settings.held_out).is_file():
            raise ValueError(f"held_out is {settings.held_out!r}, which is no file")
        # Nothing but that file is held out, and nothing in it is trained on.
        held_out, everything = list(_file_rows(Path(settings.held_out))), [*training, *held_out]
        known = {_key(row) for row in held_out}
        training = [row for row in everything if _key(row) not in known]
    training = list(islice(training, settings.max_examples))
    if not training:
        raise ValueError(f"{settings.data} has no training examples")
    if not held_out:
        raise ValueError(
            f"{settings.data} has no held-out examples: none of its {len(training)} falls into held_out_fraction "
            f"{settings.held_out_fraction:g} by its hash (equal ones fall together); give more, or --held-out FILE"
        )
    digest = hashlib.sha256("\n".join(_key(row) for row in (*training, *held_out)).encode()).hexdigest()
    return Rows(training=training, held_out=held_out, label_names=names, sha256=digest)


def _numbered(rows: Iterable[Mapping[str, Any]], source: str | Path) -> Iterator[Row]:
    return (Row(fields, number, source) for number, fields in enumerate(rows, 1))


def _parted(rows: Iterable[tuple[Row, str]], fraction: float) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows; all rows of one key fall on one side."""
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row, key in rows:
        hashed = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8])
        parts[hashed < fraction * 2**64].append(row)
    return parts


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps(row, sort_keys=True, default=str)


def _file_rows(path: Path) -> Iterable[Row]:
    ending = ending_of(path)
    if ending in files.RECORDS:
        tally = Tally()
        yield from _numbered(files.records(path, tally), path)
        if tally.skipped.total():
            reasons = ", ".join(f"{count} {reason}" for reason, count in tally.skipped.items())
            raise ValueError(f"{path} holds lines that are no examples ({reasons}): mend or remove them")
    elif ending in TABLES:
        datasets = needed("datasets", f"reading {path}")
        with foreign(f"{path} cannot be read"):
            table = datasets.load_dataset(TABLES[ending], data_files=str(path.resolve()), split="train")
            yield from _numbered(table, path)
    else:
        raise ValueError(f"{path} is no file of examples: those end in .jsonl, .json, .parquet or .csv")


def _data_set(name: str) -> tuple[list[Row], list[Row], tuple[str, ...] | None]:
    """Training and held-out rows of a Hugging Face data set, and the names of its labels."""
    source, subset = name, None
    task = name.removeprefix("glue/")
    if task != name and not Path(name).exists():
        if task not in GLUE_TASKS:
            raise ValueError(f"{name!r} is no task of GLUE with labels; those are {', '.join(GLUE_TASKS)}")
        source, subset = GLUE, task
    elif not Path(name).is_dir() and name.count("/") != 1:
        shipped = " or ".join(stdlib_tasks.SHIPPED)
        raise ValueError(f"no such data: {name!r} is no file, no data set (owner/name), and neither {shipped}")
    datasets = needed("datasets", f"reading {name}")
    with foreign(f"the data set {name!r} cannot be read"):
        splits = datasets.load_dataset(source, subset)
    if "train" not in splits:
        raise ValueError(f"the data set {name!r} has no split 'train' but {', '.join(splits)}")
    label = splits["train"].features.get("label")
    held_out = next((split for split in HELD_OUT_SPLITS if split in splits), None)
    training, measured = (
        list(_numbered(splits[split], f"{name} ({split})")) if split else [] for split in ("train", held_out)
    )
    return training, measured, tuple(label.names) if hasattr(label, "names") else None
