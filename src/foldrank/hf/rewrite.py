"""One safetensors file written anew with some of its tensors changed, one tensor in memory at a time.

The library cannot do it: `save_file` takes all tensors of a file at once, and what it opens is mapped, so that the
pages read count as memory of the process. What is written here is the format of its README
(https://github.com/huggingface/safetensors, "Format"): the size of the header in 8 bytes, little-endian; the header,
JSON padded with spaces; the bytes of the tensors in the order of the header, without gaps.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

ALIGNMENT = 8
"""Of the bytes of the first tensor in the file. Wider dtypes come first, so that each tensor is aligned to its own."""

CHUNK_BYTES = 1 << 18
"""Copied at a time: it stays in the processor's cache, which was as fast as `os.sendfile`, and works everywhere."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What a tensor to be changed may hold, in the header's words."""


def rewrite(
    source: Path, target: Path, *, names: Mapping[str, str], changes: Mapping[str, Callable[[Tensor], Tensor]]
) -> int:
    """Writes to `target` the tensors that `names` holds, of a file that `safe_open` has found to be whole.

    Args:
        source: a safetensors file.
        target: written to, whatever it holds; a part of it may stay where an error is raised.
        names: from the name of each tensor that is kept to the one it gets.
        changes: from the names of tensors to functions that give the new values, of the same shape and dtype.

    Returns:
        Bytes of the tensors written.

    Raises:
        ValueError: for a tensor to be changed that is not of floating point, or a file that ends too early.
        OSError: where a file cannot be read or written.
    """
    with source.open("rb") as stream, _written(source, target) as out:
        start, metadata, selected = _selected(stream, names)
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name, entry in selected:
            begin, end = end, end + _num_bytes(entry)
            header[names[name]] = {**entry, "data_offsets": [begin, end]}
        out.write(_encoded(header))
        for name, entry in selected:
            stream.seek(start + entry["data_offsets"][0])
            if name in changes and _num_bytes(entry):
                changed = changes[name](_read(stream, name, entry))
                out.write(changed.contiguous().flatten().view(torch.uint8).numpy().data)
            else:
                _copy(stream, out, _num_bytes(entry))
    return end


def _selected(stream: BinaryIO, names: Mapping[str, str]) -> tuple[int, Any, list[tuple[str, dict[str, Any]]]]:
    """Where the tensors' bytes start, the file's metadata, and the entries that `names` holds, as they are written."""
    size = int.from_bytes(stream.read(8), "little")
    header = json.loads(stream.read(size))
    entries = [(name, header[name]) for name in header if name in names]
    entries.sort(key=lambda item: item[1]["data_offsets"][0])
    # As the library writes them already; others need not. Sorting keeps the order of those that are equally wide.
    entries.sort(key=lambda item: -_bits(item[1]["dtype"]))
    return 8 + size, {"format": "pt"} | header.get("__metadata__", {}), entries


def _encoded(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bits(dtype: str) -> int:
    """Of one number: 16 of BF16, 8 of F8_E4M3."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) if bits else 8  # BOOL


def _num_bytes(entry: Mapping[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return end - begin


def _read(stream: BinaryIO, name: str, entry: Mapping[str, Any]) -> Tensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} is of {entry['dtype']}, and only {', '.join(DTYPES)} can be folded")
    content = bytearray(_num_bytes(entry))
    _fill(stream, memoryview(content))
    return torch.frombuffer(content, dtype=DTYPES[entry["dtype"]]).view(entry["shape"])


def _copy(stream: BinaryIO, out: BinaryIO, num_bytes: int) -> None:
    chunk = memoryview(bytearray(min(CHUNK_BYTES, num_bytes)))
    while num_bytes:
        part = chunk[:num_bytes]
        _fill(stream, part)
        out.write(part)
        num_bytes -= len(part)


def _fill(stream: BinaryIO, view: memoryview) -> None:
    if stream.readinto(view) != len(view):  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(f"{stream.name} is truncated: it became shorter while it was read")


@contextmanager
def _written(source: Path, target: Path) -> Iterator[BinaryIO]:
    try:
        with target.open("wb") as out:
            yield out
    except OSError as error:
        raise OSError(f"{target} cannot be written from {source}: {error}") from error
