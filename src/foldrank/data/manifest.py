"""What a folder of prepared data says of itself: `manifest.json`, and `journal.json` while it grows."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from foldrank.atomic import write_text
from foldrank.data.config import DataConfig, Split
from foldrank.hf.tokenizers import MAX_ID
from foldrank.structured import read_json_table, to_json

FORMAT = 4
"""Version of the folder's layout; part of every key."""

MANIFEST = "manifest.json"
JOURNAL = "journal.json"

MAX_TOKENS = 1 << 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A file of token ids and its index."""

    tokens: int
    documents: int
    file: str
    sha256: str
    index: str
    """File with the offsets of the documents."""
    index_sha256: str

    def __post_init__(self) -> None:
        if not (0 <= self.documents <= self.tokens <= MAX_TOKENS):
            raise ValueError(f"{self.documents} documents in {self.tokens} tokens")
        if any(Path(name).name != name for name in (self.file, self.index)):
            raise ValueError(f"{self.file!r} and {self.index!r} must be names of files beside it")


@dataclass(frozen=True, kw_only=True, slots=True)
class Journal:
    """How far an unfinished preparation is."""

    config: Mapping[str, Any]
    """Settings of the data."""
    documents: int = 0
    """Documents that are safely on the disk."""
    text_sha256: str = ""
    """Hash of their text."""
    shards: Mapping[Split, Sequence[Shard]] = field(default_factory=lambda: {"train": (), "validation": ()})
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> "Journal | None":
        """The journal in a folder; None where there is none, or none that can be gone on with."""
        try:
            return _JOURNAL.validate_python(read_json_table(folder / JOURNAL))
        except (ValueError, ValidationError):
            return None

    def write(self, folder: Path) -> None:
        """Writes it, whole or not at all."""
        write_text(folder / JOURNAL, to_json(asdict(self)) + "\n")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerFiles:
    """The tokenizer beside the tokens."""

    name: str | None
    """As it was named; None for one that was trained on the text."""
    files: Mapping[str, str]
    """From the name of each of its files to its SHA-256."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitFiles:
    """What a split holds."""

    documents: int
    tokens: int
    shards: Sequence[Shard]

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> "SplitFiles":
        """The split that these shards make."""
        documents, tokens = sum(shard.documents for shard in shards), sum(shard.tokens for shard in shards)
        return cls(documents=documents, tokens=tokens, shards=tuple(shards))

    def __post_init__(self) -> None:
        sums = sum(shard.documents for shard in self.shards), sum(shard.tokens for shard in self.shards)
        if (self.documents, self.tokens) != sums or not self.shards:
            raise ValueError(f"its shards hold {sums[0]} documents and {sums[1]} tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a finished folder holds.

    Raises:
        ValueError: naming what is out of range.
    """

    config: DataConfig
    """Settings with which it was prepared."""
    tokenizer: TokenizerFiles
    vocab_size: int
    """One more than the largest id of the tokenizer."""
    end_token: int
    pad_token: int
    dtype: Literal["<u2", "<u4"]
    """Of the token ids."""
    documents: int
    bytes_read: int
    """Of text and records, decompressed."""
    bytes_lost: int
    """Of these, what could not be read."""
    skipped: Mapping[str, int]
    """What was left out, by reason."""
    text_sha256: str
    """Hash of all text in its order."""
    splits: Mapping[Split, SplitFiles]
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.splits.keys() != {"train", "validation"}:
            raise ValueError(f"splits must be train and validation, got {', '.join(self.splits)}")
        if not 0 < self.vocab_size <= MAX_ID:
            raise ValueError(f"vocab_size must lie between 1 and {MAX_ID}, got {self.vocab_size}")
        for name in ("end_token", "pad_token"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name} must be an id below vocab_size, got {getattr(self, name)}")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a folder, if it is as it was written.

        Raises:
            ValueError: naming the file and what is wrong with it.
        """
        file = folder / MANIFEST
        values = read_json_table(file)
        if values.get("format") != FORMAT:
            raise ValueError(f"{folder} was prepared by another version of foldrank: prepare it again")
        checksum = values.pop("sha256", None)
        try:
            manifest = _MANIFEST.validate_python(values)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "it"
            raise ValueError(f"{file} is damaged: {where}: {problem['msg']}: prepare the text again") from error
        if checksum != manifest._checksum():
            raise ValueError(f"{file} is not as it was written (its checksum differs): prepare the text again")
        return manifest

    def write(self, folder: Path) -> None:
        """Writes it, whole or not at all."""
        write_text(folder / MANIFEST, to_json({**asdict(self), "sha256": self._checksum()}, indent=2) + "\n")

    def _checksum(self) -> str:
        return hashlib.sha256(to_json(asdict(self)).encode()).hexdigest()


_MANIFEST = TypeAdapter(Manifest)
_JOURNAL = TypeAdapter(Journal)
