"""What is kept of a benchmark: one JSON file with everything measured and everything that it depends on."""

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from foldrank.atomic import write_text
from foldrank.bench import BENCHMARKS
from foldrank.bench.settings import Settings
from foldrank.provenance import commit, versions
from foldrank.structured import read_json_table, to_json

SCHEMA = 1
"""Version of a record."""

ALLOCATOR = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "PYTORCH_ALLOC_CONF", "THP_MEM_ALLOC_ENABLE")
"""Beginnings of the environment variables that choose or tune how memory is allocated."""

Cases = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""From a case (a shape, a layout; most benchmarks have one) to its methods, the baseline first, to their figures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """The check of numerics that came before any clock: ways to compute one thing gave the same."""

    what: str
    difference: float
    bound: float

    def check(self) -> "Gate":
        """This gate.

        Raises:
            ValueError: where the difference is above the bound.
        """
        if not self.difference <= self.bound:
            raise ValueError(
                f"numerics gate: {self.what} differ by {self.difference:.3g}, more than {self.bound:g}; no speed is "
                "reported of ways that do not compute the same"
            )
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What a benchmark found."""

    cases: Cases
    gates: tuple[Gate, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A benchmark that was run."""

    settings: Mapping[str, Any]
    """All of `Settings`, methods filled in."""

    cases: Cases
    gates: tuple[Mapping[str, Any], ...] = ()
    date: str = ""
    commit: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)


def make_record(settings: Settings, findings: Findings) -> Record:
    """The record of what was found just now, here."""
    sizes = settings.sizes()
    resolved = {
        "recipe": Path(settings.recipe).stem,
        "model": asdict(sizes.model),
        "rank": sizes.low_rank and sizes.low_rank.rank,
        "methods": list(settings.method_names),
        "layers": sizes.model.num_layers,
        "batch_size": sizes.train.batch_size,
        "sequence_length": sizes.train.sequence_length,
        "vocabulary": settings.vocabulary_size(),
        "dtype": sizes.train.dtype,
    }
    return Record(
        settings={**asdict(settings), **resolved},
        cases=findings.cases,
        gates=tuple(asdict(gate) for gate in findings.gates),
        date=datetime.now(UTC).date().isoformat(),
        commit=commit(),
        versions=versions(),
        machine=machine(settings.device),
    )


def machine(device: str) -> dict[str, Any]:
    """Processor, threads, what the environment says of memory, and the GPU where one is measured."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "allocator": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(ALLOCATOR)},
    }
    return found | ({"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if device == "cuda" else {})


def as_json(record: Record) -> dict[str, Any]:
    """A record as plain values; `from_json` is the way back."""
    return {"schema": SCHEMA, **asdict(record)}


def from_json(entries: dict[str, Any]) -> Record:
    """The record with these values.

    Raises:
        ValueError: for another schema.
    """
    if entries["schema"] != SCHEMA:
        raise ValueError(f"its schema is {entries['schema']} and this version of foldrank reads {SCHEMA}")
    return Record(**{name: value for name, value in entries.items() if name != "schema"})


def write_record(folder: Path, record: Record) -> Path:
    """Keeps a record in `folder` under a name of its own, whole or not at all."""
    settings = record.settings
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{settings['benchmark']}-{settings['recipe']}-{settings['device']}-{record.date}"
    number = next(number for number in range(1, 1000) if not (folder / f"{stem}-{number}.json").exists())
    file = folder / f"{stem}-{number}.json"
    write_text(file, to_json(as_json(record), indent=1) + "\n")
    return file


def read_records(folder: Path) -> dict[str, Record]:
    """The records in `folder` by file name, in the order of their names; files of other names are passed over.

    Raises:
        ValueError: naming a file that is no record.
    """
    found = {}
    for file in sorted(folder.glob("*.json")):
        if file.name.partition("-")[0] not in BENCHMARKS:
            continue
        try:
            found[file.name] = from_json(read_json_table(file))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no record of a benchmark ({error}): delete it, or measure again") from error
    return found
