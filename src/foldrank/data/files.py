"""Text in files: plain, JSON lines and Parquet, compressed or not, read piece by piece in constant memory."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

JSON_LINES = {".jsonl", ".ndjson", ".json"}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}

MAX_CHARS = 1 << 22
"""Characters after which a text file goes on as a further document."""

BATCH_ROWS = 256
"""Rows of a Parquet file read at a time."""


def texts(path: Path, field: str, skipped: Counter[str], longest: int = MAX_CHARS) -> Iterator[tuple[object, int]]:
    """The texts of a file (anything but a string is a row without text), each with the bytes of the file read so far.

    Args:
        path: `.jsonl`, `.ndjson` and `.json` hold one JSON object a line, `.parquet` is Parquet, anything else is
            UTF-8 text; `.gz`, `.bz2`, `.xz` or `.zst` after it is decompressed.
        field: where JSON lines and Parquet have the text.
        skipped: counts what is left out, by reason.
        longest: characters after which plain text is cut, at the end of a line where there is one soon.

    Raises:
        ValueError: for a file that is damaged, or without the field.
    """
    kind = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    try:
        if kind == ".parquet":
            yield from _parquet(path, field)
        else:
            with path.open("rb") as raw, _decompressed(path, raw) as stream:
                documents = _json_lines(path, stream, field, skipped) if kind in JSON_LINES else _plain(stream, longest)
                for text in documents:
                    yield text, raw.tell()
    except UnicodeDecodeError:
        skipped["undecodable"] += 1
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise ValueError(f"{path} cannot be read, it may be damaged: {error}") from error


def digest(paths: list[Path], root: Path) -> bytes:
    """A hash of files: their names under `root` and their content."""
    combined = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            combined.update(f"{path.relative_to(root)}\0".encode() + hashlib.file_digest(file, "sha256").digest())
    return combined.digest()


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix == ".zst":
        pyarrow = needed("pyarrow", f"reading {path}")
        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))  # pyright: ignore[reportReturnType]
    openers: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers[path.suffix](raw) if path.suffix in openers else raw


def _plain(stream: IO[bytes], longest: int) -> Iterator[str]:
    with io.TextIOWrapper(stream, encoding="utf-8") as lines:
        text = lines.read(longest)
        yield text + lines.readline(longest)  # to the end of the line, or of as much more where it has none
        while text := lines.read(longest):
            yield text + lines.readline(longest)


def _json_lines(path: Path, stream: IO[bytes], field: str, skipped: Counter[str]) -> Iterator[object]:
    for number, line in enumerate(stream):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            skipped["invalid JSON"] += 1
            continue
        if number == 0 and isinstance(row, dict) and field not in row:
            raise ValueError(missing_field(path, field, row))
        yield row.get(field) if isinstance(row, dict) else None


def _parquet(path: Path, field: str) -> Iterator[tuple[object, int]]:
    parquet = needed("pyarrow.parquet", f"reading {path}")
    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if field not in names:
                raise ValueError(missing_field(path, field, names))
            size, rows, done = path.stat().st_size, table.metadata.num_rows, 0
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    done += 1
                    yield value, size * done // rows
    except needed("pyarrow", f"reading {path}").ArrowException as error:
        raise OSError(error) from error


def missing_field(where: object, field: str, names: Any) -> str:
    """What to say where rows have no field of this name."""
    return f"{where} has no field {field!r} but {', '.join(map(repr, names))}: name the one with the text (text_field)"


def needed(module: str, purpose: str) -> Any:
    """Imports a module of the extra `foldrank[data]`.

    Raises:
        ValueError: where it is not installed.
    """
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(f"{purpose} needs the package {package}: pip install 'foldrank[data]'") from error
