"""Sources of text: each yields documents in a fixed order, already parted into training and validation."""

import hashlib
import os
import sysconfig
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from foldrank.data import files, hub
from foldrank.data.config import DataConfig, Split
from foldrank.data.files import Tally
from foldrank.data.token_files import held_out_split, token_documents, token_files

TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
"""Folders of the standard library that are no part of the corpus."""

PROSE = {".md", ".rst", ".txt", "METADATA"}
INSTALLED = {"site-packages": {".py", *PROSE}, "site-packages-prose": PROSE}
"""What is read of the installed packages: endings of files, or names of files without one."""

MIN_CHARACTERS = 8
"""A text with less than this, white space apart, is near-empty."""

CHARS_OF_A_TOKEN = 4
"""About as many as a token of common tokenizers stands for."""

SAMPLE_DOCUMENTS = 20
"""Documents of a file that a sample reads."""

CHUNK_CHARS = 1 << 14
"""Characters of the documents into which one text file alone is cut, so that a part of it can be held out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text, or the token ids of one."""

    text: str
    """Empty where `ids` are there."""
    ids: np.ndarray | None = None
    """Where the source holds token ids: int64, the end token last."""
    digest: bytes
    """sha256 of the text, or of the ids."""
    split: Split
    fraction: float | None
    """How much of the source is read with it, 0 to 1; None where that is unknown."""

    @property
    def size(self) -> int:
        """Characters, or what so many tokens stand for."""
        return len(self.text) if self.ids is None else CHARS_OF_A_TOKEN * len(self.ids)


def documents(config: DataConfig, tally: Tally | None = None) -> Generator[Document]:
    """The documents of `config.source`, in an order that is always the same, read in constant memory.

    Args:
        config: names the source.
        tally: counts what is read and what is left out (top of files.py); also: in the validation split.

    Raises:
        ValueError: for a source that does not exist or cannot be read, or of which too much is lost.
    """
    tally = Tally() if tally is None else tally
    held_out: set[bytes] = set()
    if (validation_split := held_out_split(config)) is not None:
        for content, digest, _ in _usable(config, validation_split, tally):
            held_out.add(digest)
            yield _document(content, digest, "validation", 0.0)
    for number, (content, digest, fraction) in enumerate(
        islice(_usable(config, config.split or "train", tally), config.max_documents), start=1
    ):
        if validation_split is None:
            # By content: a text that occurs twice falls on one side.
            is_held_out = int.from_bytes(digest[:8]) < config.validation_fraction * 2**64
            split: Split = "validation" if is_held_out else "train"
        elif digest in held_out:
            tally.skipped["in the validation split"] += 1
            continue
        else:
            split = "train"
        if config.max_documents is not None:
            fraction = max(fraction or 0.0, number / config.max_documents)
        yield _document(content, digest, split, fraction)
    tally.check()


def _document(content: str | np.ndarray, digest: bytes, split: Split, fraction: float | None) -> Document:
    text, ids = (content, None) if isinstance(content, str) else ("", content)
    return Document(text=text, ids=ids, digest=digest, split=split, fraction=fraction)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What the start of one file holds."""

    path: str
    kind: str
    """text, records, parquet or binary."""
    bytes: int
    """Of the file."""
    documents: int
    """In the sample."""
    tally: Tally
    error: str | None
    """Why it cannot be read; None where it can."""


def sample(config: DataConfig) -> tuple[list[Sample], Tally]:
    """Reads the first documents of every file of a source on disk, and what is left out of the folder.

    Raises:
        ValueError: for a source that does not exist, or is no file or folder of text.
    """
    if config.token_format is not None:
        raise ValueError(f"{config.source} is said to hold token ids: only text is checked file by file")
    if hub.is_data_set(config):
        raise ValueError(f"{config.source} is a Hugging Face data set: only files and folders are checked file by file")
    tally = Tally()
    root, paths = _files(config, tally)
    samples = []
    for path in paths:
        part, kind, count, error = Tally(), "", 0, None
        try:
            kind = files.kind_of(path)
            texts = files.texts(path, config.text_field, part, alone=path == root)
            count = sum(1 for text, _ in islice(texts, SAMPLE_DOCUMENTS) if isinstance(text, str))
            part.check()
        except (ValueError, *files.UNREADABLE) as problem:
            error = str(problem)
        size = path.stat().st_size
        samples.append(Sample(path=str(path), kind=kind, bytes=size, documents=count, tally=part, error=error))
    return samples, tally


def fingerprint(config: DataConfig) -> bytes:
    """A hash of what local files hold; empty for a data set on the hub."""
    if config.token_format is not None and (paths := token_files(config)):
        indices = [file for path in paths if (file := path.with_suffix(".idx")).is_file()]
        return files.digest([*paths, *indices], paths[0].parent)
    if hub.is_data_set(config):
        folder = Path(config.source)
        return files.digest(_visible(folder, Tally()), folder) if folder.exists() else b""
    root, paths = _files(config)
    return files.digest(paths, root)


def is_prepared(folder: Path) -> bool:
    """Whether `folder` holds prepared data instead of text."""
    return (folder / "manifest.json").exists() and (folder / "tokenizer").is_dir()


def no_token_format(config: DataConfig) -> ValueError:
    """What is said of prepared data that is called token ids of others."""
    return ValueError(f"{config.source} holds prepared data, which is read as it is: leave out token_format")


def _usable(config: DataConfig, split: str, tally: Tally) -> Iterator[tuple[str | np.ndarray, bytes, float | None]]:
    if config.token_format is not None:
        if is_prepared(Path(config.source)):
            raise no_token_format(config)
        for ids, fraction in token_documents(config, split, tally):
            if len(ids) == 1:
                tally.skipped["near-empty"] += 1
            else:
                yield ids, hashlib.sha256(ids.astype("<u4").tobytes()).digest(), fraction
        return
    texts = _row_texts(config, split, tally) if hub.is_data_set(config) else _file_texts(config, tally)
    for text, fraction in texts:
        if not isinstance(text, str):
            tally.skipped["no text"] += 1
        elif len(text.strip()) < MIN_CHARACTERS:
            tally.skipped["near-empty"] += 1
        elif "\0" in text:
            tally.skipped["binary"] += 1
        else:
            tally.characters += len(text)
            yield text, hashlib.sha256(text.encode()).digest(), fraction


def _row_texts(config: DataConfig, split: str, tally: Tally) -> Iterator[tuple[object, float | None]]:
    for text, fraction in hub.rows(config, split, config.text_field):
        if isinstance(text, str):
            tally.bytes += len(text)
            yield tally.readable(text, config.source), fraction
        else:
            yield text, fraction


def _file_texts(config: DataConfig, tally: Tally) -> Iterator[tuple[object, float]]:
    root, paths = _files(config, tally)
    sizes = [path.stat().st_size for path in paths]
    before, total = 0, max(1, sum(sizes))
    for path, size in zip(paths, sizes, strict=True):
        longest, alone = CHUNK_CHARS if path == root else files.MAX_CHARS, path == root
        for text, read in files.texts(path, config.text_field, tally, alone=alone, longest=longest):
            yield text, (before + read) / total
        before += size


def _files(config: DataConfig, tally: Tally | None = None) -> tuple[Path, list[Path]]:
    """The root of a source and its files in order; a file alone is its own root."""
    tally = Tally() if tally is None else tally
    if (config.subset, config.split, config.validation_split) != (None, None, None):
        raise ValueError(f"{config.source!r} is no Hugging Face data set, and only those have subset and split")
    if config.source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return root, sorted(path for path in root.rglob("*.py") if not TEST_FOLDERS & set(path.relative_to(root).parts))
    if config.source in INSTALLED:
        root = Path(sysconfig.get_path("purelib"))
        return root, [path for path in _visible(root, tally) if (path.suffix or path.name) in INSTALLED[config.source]]
    path = Path(config.source)
    if is_prepared(path):
        raise ValueError(f"{config.source} holds prepared data, which is tokens, where text is needed")
    if path.is_file():
        return path, [path]
    if path.is_dir():
        return path, _visible(path, tally)
    raise ValueError(
        f"no such corpus: {config.source!r} is neither 'stdlib' nor 'site-packages' (or 'site-packages-prose') nor a "
        "file or folder, nor does it look like a Hugging Face data set (owner/name)"
    )


def _visible(folder: Path, tally: Tally) -> list[Path]:
    """The files below a folder in the order of their names: links are followed, and each file is there once."""
    found, seen = [], {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        real_parent = os.path.realpath(parent)
        for name in list(folders):
            real = _real_path(real_parent, name)
            if name.startswith("."):
                folders.remove(name)
            elif real in seen:
                folders.remove(name)
                tally.skipped["link to a folder that is read already"] += 1
            else:
                seen.add(real)
        for path in (Path(parent, name) for name in sorted(names) if not name.startswith(".")):
            real = _real_path(real_parent, path.name)
            if not path.is_file():
                tally.skipped["link that leads nowhere" if path.is_symlink() else "no regular file"] += 1
            elif real in seen:
                tally.skipped["link to a file that is read already"] += 1
            else:
                found.append(path)
                seen.add(real)
    return sorted(found)


def _real_path(real_parent: str, name: str) -> str:
    # os.path.realpath asks of each folder above whether it is a link: 10 s for 100,000 files.
    path = os.path.join(real_parent, name)
    return os.path.realpath(path) if os.path.islink(path) else path
