"""The tables of benchmarks/README.md, made of the records alone and put between two marks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from foldrank.atomic import write_text
from foldrank.bench import BENCHMARKS
from foldrank.bench.record import Record, read_records

BEGIN = "<!-- tables: foldrank bench --report -->"
END = "<!-- end of the tables -->"

MIB = 1 << 20


def _ratio(ratio: list[float]) -> str:
    low, median, high = ratio
    return f"{median:.3f}" if low == high else f"{median:.3f} ({low:.3f} to {high:.3f})"


def _mib(count: float) -> str:
    return f"{count / MIB:,.1f}"


THEORETICAL = ("flops_per_token", "bytes_read")
"""Figures that say by how much a method should be faster than the first: training by its FLOPs, decoding by the bytes
of weights that it reads."""

COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "ratio": ("time ratio (quartiles)", _ratio),
    "ratio_of_the_fastest": ("of the fastest", "{:.3f}".format),
    "seconds": ("ms", lambda seconds: f"{seconds * 1e3:,.2f}"),
    "speedup": ("speed", "{:.2f}".format),
    "theoretical_speedup": ("theoretical, by FLOPs or bytes", "{:.2f}".format),
    "efficiency": ("efficiency", "{:.2f}".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "mfu": ("MFU", "{:.1%}".format),
    "share": ("share of load and step", "{:.2%}".format),
    "parameters": ("parameters", "{:,}".format),
    "bytes_read": ("weights read, MiB", _mib),
    "weights_bytes": ("weights, MiB", _mib),
    "gradients_bytes": ("gradients", _mib),
    "optimizer_bytes": ("optimizer", _mib),
    "activations_bytes": ("activations", _mib),
    "step_peak_bytes": ("peak of a step", _mib),
    "step_peak_ratio": ("ratio", "{:.4f}".format),
    "bytes": ("checkpoint, MiB", _mib),
    "files": ("files", str),
    "largest_file_bytes": ("largest file", _mib),
    "idle_bytes": ("process before", _mib),
    "peak_bytes": ("peak, MiB", _mib),
    "over_weights": ("peak above it, over weights", "{:.3f}".format),
    "peak_ratio": ("ratio", "{:.4f}".format),
}
"""From the name of a figure to its title in a table and how it is written. The record holds more than these."""


def update(page: Path) -> list[str]:
    """Writes the tables into `page` anew, of the records in the folder `records` beside it; gives their names.

    Raises:
        ValueError: where the page has no place for tables, or a record is none.
        OSError: where it cannot be read or written.
    """
    text = page.read_text()
    if BEGIN not in text or END not in text.partition(BEGIN)[2]:
        raise ValueError(f"{page} has no place for the tables: add the lines {BEGIN} and {END}")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    records = read_records(page.parent / "records")
    write_text(page, f"{before}{BEGIN}\n\n{tables(records)}\n{END}{after}")
    return list(records)


def tables(records: Mapping[str, Record]) -> str:
    """All records by benchmark, as Markdown."""
    parts = []
    for benchmark, summary in BENCHMARKS.items():
        of_benchmark = {name: record for name, record in records.items() if record.settings["benchmark"] == benchmark}
        if of_benchmark:
            parts.append(f"### {benchmark}: {summary}\n")
            parts += ["\n".join(section(name, record)) for name, record in of_benchmark.items()]
    return "\n".join(parts) if parts else "No records yet.\n"


def describe(name: str, record: Record) -> str:
    """One paragraph: what was measured, on what, and the gates."""
    settings, machine = record.settings, record.machine
    threads = f", {machine['threads']} threads" if settings["device"] == "cpu" else ""
    allocator = "".join(f", {name}={value}" for name, value in machine.get("allocator", {}).items())
    device = machine["cpu"] if settings["device"] == "cpu" else machine["device"]
    # Of one method the table does not say which, and bytes are measured once.
    method = f" ({settings['methods'][0]})" if len(settings["methods"]) == 1 else ""
    rounds = "" if settings["benchmark"] == "memory" else f", {settings['rounds']} rounds"
    gates = "; ".join(f"{gate['what']}: {gate['difference']:.2g} (at most {gate['bound']:g})" for gate in record.gates)
    return (
        f"`{name}`: {settings['recipe']}{method}, {settings['layers']} blocks, vocabulary {settings['vocabulary']:,}, "
        f"{settings['batch_size']} x {settings['sequence_length']} tokens, {settings['dtype']}"
        f"{rounds} on {device}{threads}{allocator}; "
        f"PyTorch {record.versions['torch']}, {record.date}, commit {(record.commit or 'unknown')[:10]}."
        + (f" Numerics gate: {gates}." if gates else "")
    )


def section(name: str, record: Record) -> list[str]:
    """All that the page says of a record: what was measured, its figures, its note, its profile."""
    note = record.settings.get("note")
    return [f"{describe(name, record)}\n", table(record), *([f"{note}\n"] if note else []), *_profiles(record)]


def table(record: Record) -> str:
    """A record's figures, a row per case and method; times are over those of the case's first method."""
    rows: dict[str, Mapping[str, Any]] = {}
    for case, by_method in record.cases.items():
        first = next(iter(by_method.values()))
        for model_name, figures in by_method.items():
            rows[_row(record, case, model_name)] = {**figures, **_speedup(figures, first)}
    used = [name for name in COLUMNS if any(figures.get(name) is not None for figures in rows.values())]
    return _markdown(
        ["", *(COLUMNS[name][0] for name in used)],
        [
            [row, *(COLUMNS[name][1](figures[name]) if figures.get(name) is not None else "" for name in used)]
            for row, figures in rows.items()
        ],
    )


def _row(record: Record, case: str, model_name: str) -> str:
    return model_name if len(record.cases) == 1 else f"{case}: {model_name}"


def _speedup(figures: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, float]:
    """How much faster than the first method this one is, should be, and the ratio of the two; nothing where equal."""
    for name in THEORETICAL:
        if figures.get(name) and first.get(name) != figures[name]:
            speedup, limit = 1 / figures["ratio"][1], first[name] / figures[name]
            return {"speedup": speedup, "theoretical_speedup": limit, "efficiency": speedup / limit}
    return {}


def _profiles(record: Record) -> list[str]:
    """Where the time of a run goes, a table per record."""
    rows = [
        [
            _row(record, case, model_name),
            operator["name"],
            operator["shapes"],
            f"{operator['calls']:,}",
            f"{operator['seconds'] * 1e3:,.2f}",
            f"{operator['seconds'] / figures['profile']['seconds']:.1%}",
        ]
        for case, by_method in record.cases.items()
        for model_name, figures in by_method.items()
        if "profile" in figures
        for operator in figures["profile"]["operators"]
    ]
    if not rows:
        return []
    header = ["", "operator", "shapes", "calls", "self ms", "of all operators"]
    return [
        f"<details><summary>Profile of one run, under PyTorch's profiler</summary>\n\n{_markdown(header, rows)}\n"
        "</details>\n"
    ]


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ["---"] * len(header), *rows))
