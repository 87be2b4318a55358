"""Token ids that exist already, read as documents: what others' tools wrote, and what they read.

    megatron    PREFIX.bin with PREFIX.idx, as Megatron-LM's preprocess_data.py writes them
    uint16      raw little-endian numbers, documents ended by the end token, as in nanoGPT; uint32 likewise
    input_ids   rows of a Hugging Face data set, or of .parquet files, with a column input_ids

In a folder, the files whose names begin with "val" are held out, and without any a share of the documents.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from foldrank.data import hub
from foldrank.data.config import DataConfig
from foldrank.data.files import Tally, missing_field
from foldrank.data.megatron import MegatronIndex
from foldrank.extras import needed
from foldrank.hf.tokenizers import end_token, load_tokenizer

COLUMN = "input_ids"
CHUNK = 1 << 24
"""Tokens of a raw file that are looked through at a time."""

SUFFIX = {"megatron": ".bin", "uint16": ".bin", "uint32": ".bin", "input_ids": ".parquet"}


def token_files(config: DataConfig) -> list[Path]:
    """The files of `source`, in the order of their names; none of a Hugging Face data set.

    Raises:
        ValueError: where there are none.
    """
    assert config.token_format is not None
    path, suffix = Path(config.source), SUFFIX[config.token_format]
    if config.token_format == "input_ids" and hub.is_data_set(config):
        return []
    if path.is_dir():
        found = sorted(file for file in path.glob(f"*{suffix}") if file.is_file())
    else:
        # Megatron's users name the prefix alone.
        prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
        candidates = [path if suffix == ".parquet" or path.suffix != ".idx" else prefix.with_suffix(suffix)]
        found = [file for file in (*candidates, path.with_name(path.name + suffix)) if file.is_file()][:1]
    if not found:
        raise ValueError(f"{config.source} holds no token ids: there is no file {suffix} (token_format)")
    return found


def held_out_split(config: DataConfig) -> str | None:
    """The split that is held out as a whole; None where a share of the documents is."""
    if config.token_format is None or config.validation_split is not None:
        return config.validation_split
    files = token_files(config)
    held_out = [file for file in files if _is_held_out(file)]
    return "validation" if held_out and len(held_out) < len(files) else None


def token_documents(config: DataConfig, split: str, tally: Tally) -> Iterator[tuple[np.ndarray, float | None]]:
    """The documents of a split, each ended by the end token, with the share of the source that is read with it.

    Shape:
        int64, (tokens,).

    Raises:
        ValueError: naming the file, and the token that is none.
    """
    end, files = _end_token(config), token_files(config)
    if not files:
        rows = hub.rows(config, split, COLUMN)
        for number, (value, fraction) in enumerate(rows):
            ids = _ids_of(value, f"row {number} of {config.source}")
            tally.bytes += 4 * len(ids)
            yield _ended(ids, end), fraction
        return
    parted = held_out_split(config) is not None
    wanted = [file for file in files if not parted or _is_held_out(file) == (split != (config.split or "train"))]
    total, before = max(1, sum(file.stat().st_size for file in wanted)), 0
    for file in wanted:
        size = file.stat().st_size
        for ids, part in _documents_of(file, config, end):
            yield _ended(ids, end), (before + part * size) / total
        tally.bytes += size
        before += size


def numbered_tokenizer(config: DataConfig) -> PreTrainedTokenizerBase:
    """A tokenizer that spells ids, where nothing is known of the one that they are of: "17 4" are the ids 17 and 4.

    What is no id of it is left out of a text.
    """
    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(config.vocab_size)}))
    numbers = pre_tokenizers.Split(Regex("[0-9]+"), "removed", invert=True)
    tokenizer.pre_tokenizer = numbers  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=str(config.end_token), clean_up_tokenization_spaces=False
    )


def _documents_of(file: Path, config: DataConfig, end: int) -> Iterator[tuple[np.ndarray, float]]:
    """The documents of a file, each with the share of the file that is read with it."""
    if config.token_format == "input_ids":
        yield from _rows_of(file)
        return
    size = file.stat().st_size
    if config.token_format == "megatron":
        index = file.with_suffix(".idx")
        if not index.is_file():
            raise ValueError(f"{index} is missing: Megatron's tokens are a .bin file with an .idx file beside it")
        found = MegatronIndex.read(index, size)
        dtype, offsets = found.dtype, found.document_offsets
    else:
        dtype, offsets = np.dtype("<u2" if config.token_format == "uint16" else "<u4"), None
    if not size or size % dtype.itemsize:
        raise ValueError(f"{file} has {size:,} bytes, which are no tokens of {dtype.itemsize} bytes each")
    tokens = np.memmap(file, dtype=dtype, mode="r")
    if offsets is None:
        offsets = _ends_in(tokens, end)
        if len(offsets) == 1 and tokens[-1] != end:
            raise ValueError(
                f"no token of {file} is the end token {end}, so that it is one document: name another (--end-token), "
                f"or another token_format than {config.token_format}"
            )
    start = 0
    for stop in offsets.tolist():
        ids = tokens[start:stop].astype(np.int64)
        if len(ids) and ids.min() < 0:
            raise ValueError(f"{file} holds the token {ids.min()}: ids are not below 0")
        yield ids, stop / len(tokens)
        start = stop


def _rows_of(file: Path) -> Iterator[tuple[np.ndarray, float]]:
    parquet = needed("pyarrow.parquet", f"reading {file}")
    try:
        table = parquet.ParquetFile(file)
        names, rows = table.schema_arrow.names, max(1, table.metadata.num_rows)
        if COLUMN not in names:
            raise ValueError(missing_field(str(file), COLUMN, names))
        number = 0
        for batch in table.iter_batches(columns=[COLUMN], batch_size=256):
            for value in batch.column(0).to_pylist():
                number += 1
                yield _ids_of(value, f"row {number - 1} of {file}"), number / rows
    except OSError as error:  # pyarrow's own errors are ValueErrors or these
        raise ValueError(f"{file} cannot be read: {error}") from error


def _ids_of(value: Any, where: str) -> np.ndarray:
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 1 << 32 for token in value):
        raise ValueError(f"{where}: {COLUMN} is no list of token ids, but {repr(value)[:60]}")
    return np.asarray(value, dtype=np.int64)


def _ended(ids: np.ndarray, end: int) -> np.ndarray:
    return ids if len(ids) and ids[-1] == end else np.append(ids, end)


def _ends_in(tokens: np.ndarray, end: int) -> np.ndarray:
    """Positions after each end token, and the end of the file."""
    chunks = range(0, len(tokens), CHUNK)
    ends = np.concatenate([np.flatnonzero(tokens[at : at + CHUNK] == end) + at + 1 for at in chunks])
    return ends if len(ends) and ends[-1] == len(tokens) else np.append(ends, len(tokens))


def _end_token(config: DataConfig) -> int:
    if config.tokenizer is not None:
        return end_token(load_tokenizer(config.tokenizer))
    assert config.end_token is not None  # the settings refuse token ids with neither
    return config.end_token


def _is_held_out(file: Path) -> bool:
    return file.name.lower().startswith("val")
