"""One preparation by several processes or machines: each tokenizes every so many-th block of documents.

    process 1, 2, ..: all documents -> its blocks -> tokenized -> PARTIAL/blocks/NUMBER, whole or not at all
    process 0:        all documents -> its blocks tokenized, those of others taken as they come -> shards

All read the text, which takes little beside tokenizing it; what process 0 writes is what it would write alone.
"""

import hashlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foldrank.data.corpus import Document
from foldrank.data.manifest import Journal
from foldrank.data.tokenizer import Encoder, encoded

BLOCK = 2048
"""Documents."""

BLOCKS = "blocks"
"""Folder of what other processes have tokenized, in that of the unfinished preparation."""

SECONDS_TO_WAIT = 0.1

Batch = list[tuple[Document, np.ndarray]]


@dataclass(frozen=True, slots=True)
class Share:
    """Which of the processes this one is."""

    process: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.process < self.processes:
            raise ValueError(f"process {self.process} is none of {self.processes}, which count from 0")


def taken_together(
    stream: Iterable[Document],
    encoder: Encoder,
    share: Share,
    work: Path,
    start: int,
    waiting: Callable[[int], None],
) -> Generator[Batch]:
    """Documents with their token ids, in order, of which other processes tokenize their blocks; for process 0.

    Args:
        stream: the documents from number `start` on.
        encoder: tokenizes.
        share: of this process.
        work: the folder of the unfinished preparation.
        start: documents that are done.
        waiting: is told the process that is waited for.

    Raises:
        ValueError: where another process has read other text.
    """
    for number, first, documents in _blocks(stream, start):
        if number % share.processes == 0:
            yield from encoded(documents, encoder)
            continue
        file = work / BLOCKS / str(number)
        while not file.exists():
            waiting(number % share.processes)
            time.sleep(SECONDS_TO_WAIT)
        yield _read(file, encoder.dtype, first, documents)
        if (journal := Journal.read(work)) is not None:  # what is safe in a shard is needed no more
            for taken in (work / BLOCKS).iterdir():
                if taken.name.isdigit() and (int(taken.name) + 1) * BLOCK <= journal.documents:
                    taken.unlink()


def tokenize_share(stream: Iterable[Document], encoder: Encoder, share: Share, work: Path, done: int) -> int:
    """Tokenizes the blocks of a process that is not the first; returns how many documents they hold.

    Args:
        stream: all documents.
        encoder: tokenizes.
        share: of this process.
        work: the folder of the unfinished preparation.
        done: documents that process 0 needs no more.
    """
    folder, count = work / BLOCKS, 0
    folder.mkdir(exist_ok=True)
    for number, _, documents in _blocks(stream, 0):
        file = folder / str(number)
        if number % share.processes != share.process or (number + 1) * BLOCK <= done or file.exists():
            continue
        ids = [each for batch in encoded(documents, encoder) for _, each in batch]
        partial = folder / f"{number}.partial"
        with partial.open("wb") as out:
            out.write(_digest(documents))
            np.asarray([len(documents), *map(len, ids)], dtype="<u4").tofile(out)
            for each in ids:
                each.astype(encoder.dtype, copy=False).tofile(out)
        partial.rename(file)
        count += len(documents)
    return count


def _blocks(stream: Iterable[Document], start: int) -> Iterator[tuple[int, int, list[Document]]]:
    """Blocks by number; with each the place in it of its first document, which is 0 but perhaps of the first block."""
    documents: list[Document] = []
    at = start
    for at, document in enumerate(stream, start=start + 1):
        documents.append(document)
        if at % BLOCK == 0:
            yield at // BLOCK - 1, BLOCK - len(documents), documents
            documents = []
    if documents:
        yield at // BLOCK, at % BLOCK - len(documents), documents


def _read(file: Path, dtype: np.dtype, first: int, documents: list[Document]) -> Batch:
    content = file.read_bytes()
    digest, count = content[:32], int(np.frombuffer(content, "<u4", 1, offset=32)[0])
    lengths = np.frombuffer(content, "<u4", count, offset=36).astype(np.int64)
    tokens = np.frombuffer(content, dtype, offset=36 + 4 * count)
    if first + len(documents) != count or (first == 0 and digest != _digest(documents)):
        raise ValueError(f"another process has read other text than this one ({file}): give all of them the same")
    ends = np.cumsum(lengths)
    return [
        (document, tokens[end - length : end])
        for document, end, length in zip(documents, ends[first:], lengths[first:], strict=True)
    ]


def _digest(documents: list[Document]) -> bytes:
    return hashlib.sha256(b"".join(document.digest for document in documents)).digest()
