"""The door for text: what a file is, how its bytes become text, and what is left out and counted.

- Endings count in small letters, behind those of compression (.gz, .bz2, .xz, .zst), which is undone.
- `.jsonl` and `.ndjson` hold a JSON object a line. `.json` holds that, or one object, or several, or a list of them, as
  its content is. `.parquet` is Parquet. Each object or row is a document: its field `text_field`.
- Any other file is text: UTF-8, or UTF-16 where a byte order mark says so. One document; some, where it is long.
- A file with a zero byte near its start, or a third of it no UTF-8, is binary and left out.
- In text, bytes that are no UTF-8 are dropped and counted, as are records that are no JSON. Where they are more than
  one byte in a hundred, that is an error: the text is in another encoding, or damaged.
- Left out as well, and counted: texts of next to nothing, rows without text, and in a folder: files whose name, or a
  folder's above, begins with a dot, records without the field, links that lead nowhere or to what is read already.
"""

import bz2
import codecs
import gzip
import hashlib
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from foldrank.extras import needed

RECORDS = {".jsonl", ".ndjson", ".json"}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}

MAX_CHARS = 1 << 22
"""Characters after which a text file goes on as a further document."""

MAX_RECORD_CHARS = 1 << 28
"""Characters of one JSON value at most."""

BATCH_ROWS = 256
"""Rows of a Parquet file read at a time."""

SAMPLE_BYTES = 1 << 13
"""Of the start of a file, by which it is known to be binary."""

MAX_LOST = 0.01
"""Of all bytes, the fraction that may be lost."""

FIRST_VERDICT_BYTES = 1 << 24
"""Bytes after which a loss is told while reading goes on, and not at the end."""

UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)
"""What reading a damaged file raises."""

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""What stands for a byte that is no UTF-8, and what JSON can spell that is no character."""


@dataclass(kw_only=True)
class Tally:
    """What was read of a source and what was not."""

    bytes: int = 0
    """Of text and records, decompressed."""
    characters: int = 0
    """Of the documents that came of it."""
    lost_bytes: int = 0
    """Of the bytes, what could not be read."""
    lost_in: Counter[str] = field(default_factory=Counter)
    """Lost bytes by file."""
    skipped: Counter[str] = field(default_factory=Counter)
    """What was left out, by reason."""

    def readable(self, text: str, where: object) -> str:
        """`text` without what is no character, which is counted as lost."""
        whole = LONE_SURROGATE.sub("", text)
        self.lose(where, len(text) - len(whole))
        return whole

    def lose(self, where: object, count: int) -> None:
        """Counts bytes of a file, or another source, that were lost."""
        if count:
            self.lost_bytes += count
            self.lost_in[str(where)] += count

    def check(self) -> None:
        """Refuses a source of which too much was lost.

        Raises:
            ValueError: naming the file with the largest loss.
        """
        if self.lost_bytes > MAX_LOST * self.bytes:
            worst, count = self.lost_in.most_common(1)[0]
            raise ValueError(
                f"{self.lost_bytes:,} of {self.bytes:,} bytes are neither UTF-8 nor valid JSON, most of them "
                f"({count:,}) in {worst}: convert it (iconv -f LATIN1 -t UTF-8), or take it away"
            )


def texts(
    path: Path, field: str, tally: Tally, *, alone: bool = True, longest: int = MAX_CHARS
) -> Iterator[tuple[object, int]]:
    """The texts of a file (anything but a string is a row without text), each with the bytes of the file read so far.

    Args:
        path: the file (see the top of this file).
        field: where records have the text.
        tally: counts what is read and what is left out.
        alone: whether the user named this file: then records without the field are an error.
        longest: characters after which plain text is cut, at the end of a line where there is one soon.

    Raises:
        ValueError: for a file that is damaged, or without the field.
    """
    try:
        kind = kind_of(path)
        if kind == "binary":
            tally.skipped["binary"] += 1
        elif kind == "parquet":
            yield from _parquet(path, field, tally)
        else:
            with path.open("rb") as raw, _decompressed(path, raw) as stream:
                counted = _Counted(stream, tally)
                if kind == "records":
                    documents = _records(path, counted, field, tally, alone=alone)
                else:
                    documents = _plain(path, counted, tally, longest)
                for text in documents:
                    yield text, raw.tell()
    except UNREADABLE as error:
        raise ValueError(_unreadable(path, error)) from error
    if tally.bytes > FIRST_VERDICT_BYTES:
        tally.check()


def records(path: Path, tally: Tally) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of records, whatever their fields.

    Raises:
        ValueError: for a file that is damaged.
    """
    try:
        with path.open("rb") as raw, _decompressed(path, raw) as stream:
            for row in _values(path, _decoded(_Counted(stream, tally)), tally):
                if isinstance(row, dict):
                    yield row
                else:
                    tally.skipped["no object"] += 1
    except UNREADABLE as error:
        raise ValueError(_unreadable(path, error)) from error
    tally.check()


def kind_of(path: Path) -> str:
    """What a file holds: parquet, records, text, or binary.

    Raises:
        UNREADABLE: where it cannot be read.
    """
    ending = ending_of(path)
    if ending == ".parquet":
        return "parquet"
    if ending in RECORDS:
        return "records"
    with path.open("rb") as raw, _decompressed(path, raw) as stream:
        sample = stream.read(SAMPLE_BYTES)
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "text"
    lost = len(LONE_SURROGATE.findall(sample.decode("utf-8", "surrogateescape")))
    return "binary" if b"\0" in sample or 3 * lost > len(sample) else "text"


def ending_of(path: Path) -> str:
    """A file's ending in small letters, without that of its compression."""
    ending = path.suffix.lower()
    return Path(path.stem).suffix.lower() if ending in COMPRESSED else ending


def digest(paths: list[Path], root: Path) -> bytes:
    """A hash of files: their names under `root` and their content."""
    combined = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            combined.update(f"{path.relative_to(root)}\0".encode() + hashlib.file_digest(file, "sha256").digest())
    return combined.digest()


class _Counted(io.RawIOBase):
    """A stream that counts the bytes that are read from it."""

    def __init__(self, stream: IO[bytes], tally: Tally) -> None:
        self.stream = stream
        self.tally = tally

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self.stream.read(len(buffer))
        buffer[: len(content)] = content
        self.tally.bytes += len(content)
        return len(content)


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    ending = path.suffix.lower()
    if ending == ".zst":
        pyarrow = needed("pyarrow", f"reading {path}")
        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))  # pyright: ignore[reportReturnType]
    openers: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers[ending](raw) if ending in openers else raw


def _unreadable(path: Path, error: Exception) -> str:
    if "requires too much memory" in str(error):
        return f"{path} was compressed with a window longer than is read: zstd -d --long=31 {path.name} undoes it"
    return f"{path} cannot be read, it may be damaged: {error}"


def _decoded(stream: _Counted) -> io.TextIOWrapper:
    buffered = io.BufferedReader(stream, 1 << 16)
    wide = buffered.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding, errors = ("utf-16", "replace") if wide else ("utf-8-sig", "surrogateescape")
    return io.TextIOWrapper(buffered, encoding=encoding, errors=errors)  # pyright: ignore[reportReturnType]


def _plain(path: Path, stream: _Counted, tally: Tally, longest: int) -> Iterator[str]:
    lines = _decoded(stream)
    text = lines.read(longest)
    while True:
        text += lines.readline(longest)  # to the end of the line, or of as much more where it has none
        yield tally.readable(text, path)
        if not (text := lines.read(longest)):
            return


def _records(path: Path, stream: _Counted, field: str, tally: Tally, *, alone: bool) -> Iterator[object]:
    lines = _decoded(stream)
    for number, row in enumerate(_values(path, lines, tally)):
        if isinstance(row, dict) and field not in row:
            if alone and number == 0:
                raise ValueError(missing_field(path, field, row))
            tally.skipped[f"no field {field!r}"] += 1
            continue
        text = row.get(field) if isinstance(row, dict) else None
        yield tally.readable(text, path) if isinstance(text, str) else text


def _values(path: Path, lines: io.TextIOWrapper, tally: Tally) -> Iterator[object]:
    """The JSON values of a file: a line each, or in `.json` as its content is."""
    first = ""
    if ending_of(path) == ".json":
        # As lines where the first one that is not empty holds a whole value.
        while (line := lines.readline(MAX_RECORD_CHARS)) and line.isspace():
            pass
        first = line
        try:
            if not isinstance(_row(first), dict):
                raise ValueError
        except ValueError:
            yield from _spread(path, first, lines, tally)
            return
    while line := first or lines.readline(MAX_RECORD_CHARS):
        first = ""
        if not line.isspace():
            try:
                yield _row(line)
            except ValueError:
                tally.skipped["invalid JSON"] += 1
                tally.lose(path, len(line.encode("utf-8", "surrogateescape")))


def _row(line: str) -> object:
    # What is no JSON in a strict sense, such as NaN, is common in records and does no harm here.
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _spread(path: Path, start: str, lines: io.TextIOWrapper, tally: Tally) -> Iterator[object]:
    """JSON values over several lines: the entries of a list, or one value after the other."""
    decoder = json.JSONDecoder()
    text = start.lstrip()
    inside = text.startswith("[")
    position = 1 if inside else 0
    chunk = 1 << 16
    while True:
        position = _after_blanks(text, position, ",]" if inside else "")
        try:
            value, position = decoder.raw_decode(text, position)
        except RecursionError:
            raise ValueError(f"{path} is nested too deep") from None
        except ValueError:
            # Twice as much each time, so that a long value is not tried again and again.
            more = lines.read(chunk)
            chunk *= 2
            if not more or len(text) > MAX_RECORD_CHARS:
                if rest := text[position:].strip():
                    tally.skipped["invalid JSON"] += 1
                    tally.lose(path, len(rest))
                return
            text, position = text[position:] + more, 0
            continue
        yield value


def _after_blanks(text: str, position: int, separators: str) -> int:
    while position < len(text) and (text[position].isspace() or text[position] in separators):
        position += 1
    return position


def _parquet(path: Path, field: str, tally: Tally) -> Iterator[tuple[object, int]]:
    parquet = needed("pyarrow.parquet", f"reading {path}")
    pyarrow = needed("pyarrow", f"reading {path}")
    try:
        with parquet.ParquetFile(path) as table:
            schema = table.schema_arrow
            if field not in schema.names:
                raise ValueError(missing_field(path, field, schema.names))
            kind = schema.field(field).type
            values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not any(test(values) for test in _text_types(pyarrow)):
                columns = ", ".join(f"{column.name} ({column.type})" for column in schema)
                raise ValueError(f"{path}: the column {field!r} holds no text; its columns are {columns}")
            size, rows, done = path.stat().st_size, table.metadata.num_rows, 0
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    done += 1
                    tally.bytes += 0 if value is None else len(value)
                    yield value, size * done // rows
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the column {field!r} holds bytes that are no UTF-8: {error}") from error
    except pyarrow.ArrowException as error:
        raise OSError(error) from error


def _text_types(pyarrow: Any) -> list[Callable[[Any], bool]]:
    types = pyarrow.types
    return [types.is_string, types.is_large_string, getattr(types, "is_string_view", types.is_string), types.is_null]


def missing_field(where: object, field: str, names: Any) -> str:
    """What to say where rows have no field of this name."""
    return f"{where} has no field {field!r} but {', '.join(map(repr, names))}: name the one with the text (text_field)"
