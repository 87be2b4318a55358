"""Token files that grow document by document, can be cut back to a known point, and know their own checksum."""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from foldrank.data.config import Split
from foldrank.data.manifest import Shard

SHARD_TOKENS = 1 << 26
"""Tokens after which a shard is closed, at the end of a document."""

DOCUMENT_OFFSETS = np.dtype("<u4")
"""How a shard's index keeps the position after each document's last token."""


class ShardWriter:
    """Writes a split's documents into shards; to be used in a `with` block, which leaves no file open.

    Args:
        folder: where.
        split: begins the names of the files.
        dtype: of the token ids.
        done: what `state` returned when the writing stopped; whatever came after it is cut off.

    Raises:
        ValueError: for files that are not as `done` says.
    """

    def __init__(self, folder: Path, split: Split, dtype: np.dtype, done: Sequence[Shard] = ()) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype
        self._closed = list(done)
        self._shard = Shard(tokens=0, documents=0, file="", sha256="", index="", index_sha256="")
        self._tokens: _Growing | None = None
        self._offsets: _Growing | None = None
        if self._closed and self._closed[-1].tokens < SHARD_TOKENS:
            self._shard = self._closed.pop()
            self._tokens = _Growing(folder / self._shard.file, self._shard.tokens * dtype.itemsize, self._shard.sha256)
            size = self._shard.documents * DOCUMENT_OFFSETS.itemsize
            self._offsets = _Growing(folder / self._shard.index, size, self._shard.index_sha256)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._tokens, self._offsets):
            if file is not None:
                file.abandon()

    def write(self, ids: np.ndarray) -> None:
        """Appends a document, end token included."""
        if self._tokens is None or self._offsets is None:
            name = f"{self.split}-{len(self._closed):05}"
            self._shard = replace(self._shard, tokens=0, documents=0, file=f"{name}.bin", index=f"{name}.ends")
            self._tokens = _Growing(self.folder / self._shard.file)
            self._offsets = _Growing(self.folder / self._shard.index)
        tokens = self._shard.tokens + len(ids)
        self._tokens.write(ids.astype(self.dtype, copy=False).tobytes())
        self._offsets.write(np.asarray(tokens, dtype=DOCUMENT_OFFSETS).tobytes())
        self._shard = replace(self._shard, tokens=tokens, documents=self._shard.documents + 1)
        if tokens >= SHARD_TOKENS:
            self.close()

    def state(self) -> list[Shard]:
        """The shards so far, all of them safely on the disk."""
        shards = list(self._closed)
        if self._tokens is not None and self._offsets is not None:
            shards.append(replace(self._shard, sha256=self._tokens.sync(), index_sha256=self._offsets.sync()))
        return shards

    def close(self) -> None:
        """Ends the last shard."""
        if self._tokens is not None and self._offsets is not None:
            self._closed.append(replace(self._shard, sha256=self._tokens.close(), index_sha256=self._offsets.close()))
        self._tokens = self._offsets = None


class _Growing:
    def __init__(self, file: Path, size: int = 0, sha256: str | None = None) -> None:
        self._hash = hashlib.sha256()
        self._file = file.open("wb" if sha256 is None else "r+b")
        if sha256 is not None:
            for start in range(0, size, 1 << 20):
                self._hash.update(self._file.read(min(1 << 20, size - start)))
            if self._hash.hexdigest() != sha256:
                self._file.close()
                raise ValueError(f"{file} is not as it was left: delete {file.parent} and begin again")
            self._file.truncate()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)

    def sync(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._hash.hexdigest()

    def abandon(self) -> None:
        with suppress(OSError):  # of a full disk, when the rest is flushed
            self._file.close()

    def close(self) -> str:
        sha256 = self.sync()
        self._file.close()
        return sha256
