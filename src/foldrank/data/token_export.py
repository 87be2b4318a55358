"""Prepared tokens as files that others read: Megatron-LM, nanoGPT, and whatever takes `input_ids`."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from foldrank.atomic import new_folder, refuse_existing
from foldrank.data.config import ExportFormat, Split
from foldrank.data.megatron import MegatronIndex
from foldrank.data.prepared import PreparedData
from foldrank.extras import needed

NAMES: dict[Split, str] = {"train": "train", "validation": "val"}
"""Of the files, as in nanoGPT."""

BATCH = 1 << 12
"""Documents of a row group."""


def export_tokens(data: PreparedData, form: ExportFormat, out: Path) -> list[Path]:
    """Writes `train` and `val` in a format of others, and the tokenizer beside them; `token_files.py` reads them back.

    Args:
        data: a prepared folder.
        form: megatron, .bin and .idx; raw, .bin of uint16 or, above 65,536 entries, uint32, end tokens between the
            documents; input_ids, .parquet of a document each row.
        out: a new folder.

    Returns:
        The files.

    Raises:
        FileExistsError: where `out` exists.
        ValueError: for a package that is missing.
        OSError: where something cannot be written.
    """
    refuse_existing(out)
    with new_folder(out) as work:
        for split, name in NAMES.items():
            if form == "input_ids":
                _write_rows(data, split, work / f"{name}.parquet")
            else:
                _write_numbers(data, split, work / f"{name}.bin", with_index=form == "megatron")
        shutil.copytree(data.folder / "tokenizer", work / "tokenizer")
    return sorted(path for path in out.iterdir() if path.is_file())


def _write_numbers(data: PreparedData, split: Split, file: Path, *, with_index: bool) -> None:
    # Megatron knows no unsigned numbers of four bytes; ids are far below 2^31, so that signed ones are equal.
    dtype = np.dtype("<i4") if with_index and data.dtype.itemsize == 4 else data.dtype
    offsets, before = [], 0
    with file.open("wb") as out:
        for tokens, ends in data.shards_of(split):
            out.write(tokens.astype(dtype, copy=False).tobytes())
            offsets.append(ends.astype(np.int64) + before)
            before += len(tokens)
    if with_index:
        MegatronIndex(dtype=dtype, document_offsets=np.concatenate(offsets)).write(file.with_suffix(".idx"))


def _write_rows(data: PreparedData, split: Split, file: Path) -> None:
    arrow, parquet = (needed(module, "writing .parquet") for module in ("pyarrow", "pyarrow.parquet"))
    schema = arrow.schema([("input_ids", arrow.list_(arrow.uint32()))])
    with parquet.ParquetWriter(file, schema) as writer:
        for batch in _batches(data, split):
            writer.write_table(arrow.table({"input_ids": batch}, schema=schema))


def _batches(data: PreparedData, split: Split) -> Iterator[list[Any]]:
    for tokens, ends in data.shards_of(split):
        starts = np.concatenate([[0], ends[:-1]])
        for at in range(0, len(ends), BATCH):
            rows = zip(starts[at : at + BATCH].tolist(), ends[at : at + BATCH].tolist(), strict=True)
            yield [tokens[start:stop].astype(np.uint32) for start, stop in rows]
