"""Sources of text: each yields documents in a fixed order, already parted into training and validation."""

import hashlib
import sysconfig
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from foldrank.data import files, hub
from foldrank.data.config import DataConfig, Split

TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
"""Folders of the standard library that are no part of the corpus."""

PROSE = {".md", ".rst", ".txt", "METADATA"}
INSTALLED = {"site-packages": {".py", *PROSE}, "site-packages-prose": PROSE}
"""What is read of the installed packages: endings of files, or names of files without one."""

MIN_CHARACTERS = 8
"""A text with less than this, white space apart, is near-empty."""

CHUNK_CHARS = 1 << 14
"""Characters of the documents into which one text file alone is cut, so that a part of it can be held out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text."""

    text: str
    digest: bytes
    """sha256 of the text."""
    split: Split
    fraction: float | None
    """How much of the source is read with it, 0 to 1; None where that is unknown."""


def documents(config: DataConfig, skipped: Counter[str] | None = None) -> Generator[Document]:
    """The documents of `config.source`, in an order that is always the same, read in constant memory.

    Args:
        config: names the source. Files and folders whose name begins with a dot are no part of a folder of text.
        skipped: counts what is left out, by reason: near-empty, binary, undecodable, no text, invalid JSON,
            in the validation split.

    Raises:
        ValueError: for a source that does not exist or cannot be read.
    """
    skipped = Counter() if skipped is None else skipped
    held_out: set[bytes] = set()
    if config.validation_split is not None:
        for text, digest, _ in _usable(config, config.validation_split, skipped):
            held_out.add(digest)
            yield Document(text=text, digest=digest, split="validation", fraction=0.0)
    for number, (text, digest, fraction) in enumerate(
        islice(_usable(config, config.split or "train", skipped), config.max_documents), start=1
    ):
        if config.validation_split is None:
            # By content: a text that occurs twice falls on one side.
            is_held_out = int.from_bytes(digest[:8]) < config.validation_fraction * 2**64
            split: Split = "validation" if is_held_out else "train"
        elif digest in held_out:
            skipped["in the validation split"] += 1
            continue
        else:
            split = "train"
        if config.max_documents is not None:
            fraction = max(fraction or 0.0, number / config.max_documents)
        yield Document(text=text, digest=digest, split=split, fraction=fraction)


def fingerprint(config: DataConfig) -> bytes:
    """A hash of what local files hold; empty for a data set on the hub."""
    if hub.is_data_set(config):
        folder = Path(config.source)
        return files.digest(_visible(folder), folder) if folder.exists() else b""
    root, paths = _files(config)
    return files.digest(paths, root)


def is_prepared(folder: Path) -> bool:
    """Whether `folder` holds prepared data instead of text."""
    return (folder / "manifest.json").exists() and (folder / "tokenizer").is_dir()


def _usable(config: DataConfig, split: str, skipped: Counter[str]) -> Iterator[tuple[str, bytes, float | None]]:
    for text, fraction in hub.rows(config, split) if hub.is_data_set(config) else _file_texts(config, skipped):
        if not isinstance(text, str):
            skipped["no text"] += 1
        elif len(text.strip()) < MIN_CHARACTERS:
            skipped["near-empty"] += 1
        elif "\0" in text:
            skipped["binary"] += 1
        else:
            try:
                digest = hashlib.sha256(text.encode()).digest()
            except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
                skipped["undecodable"] += 1
                continue
            yield text, digest, fraction


def _file_texts(config: DataConfig, skipped: Counter[str]) -> Iterator[tuple[object, float]]:
    root, paths = _files(config)
    sizes = [path.stat().st_size for path in paths]
    before, total = 0, max(1, sum(sizes))
    for path, size in zip(paths, sizes, strict=True):
        longest = CHUNK_CHARS if path == root else files.MAX_CHARS
        for text, read in files.texts(path, config.text_field, skipped, longest):
            yield text, (before + read) / total
        before += size


def _files(config: DataConfig) -> tuple[Path, list[Path]]:
    """The root of a source and its files in order; a file alone is its own root."""
    if (config.subset, config.split, config.validation_split) != (None, None, None):
        raise ValueError(f"{config.source!r} is no Hugging Face data set, and only those have subset and split")
    if config.source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return root, sorted(path for path in root.rglob("*.py") if not TEST_FOLDERS & set(path.relative_to(root).parts))
    if config.source in INSTALLED:
        root = Path(sysconfig.get_path("purelib"))
        return root, [path for path in _visible(root) if (path.suffix or path.name) in INSTALLED[config.source]]
    path = Path(config.source)
    if is_prepared(path):
        raise ValueError(f"{config.source} holds prepared data, which is tokens, where text is needed")
    if path.is_file():
        return path, [path]
    if path.is_dir():
        return path, _visible(path)
    raise ValueError(
        f"no such corpus: {config.source!r} is neither 'stdlib' nor 'site-packages' (or 'site-packages-prose') nor a "
        "file or folder, nor does it look like a Hugging Face data set (owner/name)"
    )


def _visible(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
