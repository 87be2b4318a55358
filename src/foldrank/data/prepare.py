"""Documents to memory-mapped token shards, once: `prepare` writes a folder, `PreparedData` reads it.

A folder holds `manifest.json`, `tokenizer/`, and for each split `SPLIT-00000.bin` ... (token ids, little-endian). It is
written under another name and renamed when whole, so a folder of the right name is always complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from foldrank.data.blocks import PackedBlocks
from foldrank.data.config import DataConfig
from foldrank.data.corpus import Document, documents
from foldrank.data.tokenizer import train_tokenizer

FORMAT = 1
"""Version of the folder's layout; part of every key."""

SHARD_TOKENS = 1 << 26
ENCODE_BYTES = 1 << 22
"""Text handed to the tokenizer at a time: enough for every core, little beside the model."""

Split = Literal["train", "validation"]
Progress = Callable[[str, int], None]
"""Called with what is going on and the documents done."""


class PreparedData:
    """A folder that `prepare` wrote.

    Raises:
        ValueError: for a folder that is none, or whose shards are not as its manifest says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder} holds no prepared data: {error}") from error
        if self.manifest.get("format") != FORMAT:
            raise ValueError(f"{folder} was prepared by another version of foldrank: prepare it again")
        for split in self.manifest["splits"].values():
            for shard in split["shards"]:
                size = (folder / shard["file"]).stat().st_size if (folder / shard["file"]).exists() else 0
                if size != shard["tokens"] * np.dtype(self.manifest["dtype"]).itemsize:
                    raise ValueError(f"{folder / shard['file']} is truncated or missing: delete {folder} and try again")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the tokens are of."""
        return AutoTokenizer.from_pretrained(self.folder / "tokenizer")

    def tokens(self, split: Split) -> int:
        """Number of tokens in a split."""
        return self.manifest["splits"][split]["tokens"]

    def blocks(self, split: Split, sequence_length: int) -> PackedBlocks:
        """The split as sequences.

        Raises:
            ValueError: for a split shorter than one sequence.
        """
        dtype = np.dtype(self.manifest["dtype"])
        files = [self.folder / shard["file"] for shard in self.manifest["splits"][split]["shards"]]
        return PackedBlocks([np.memmap(file, dtype=dtype, mode="r") for file in files], sequence_length)


def cache_folder() -> Path:
    """Where prepared data is kept: $FOLDRANK_CACHE, or foldrank/ in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FOLDRANK_CACHE") or Path(base) / "foldrank")


def prepared(config: DataConfig, progress: Progress = lambda *_: None) -> PreparedData:
    """The prepared form of `config`, from the cache where the same text was prepared before."""
    folder = cache_folder() / "data" / _key(config)
    return PreparedData(folder) if folder.exists() else prepare(config, folder, progress)


def prepare(config: DataConfig, out: Path, progress: Progress = lambda *_: None) -> PreparedData:
    """Tokenizes the documents of `config` into the folder `out`.

    Raises:
        ValueError: for a corpus without text, or one too small to be split.
        FileExistsError: where `out` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another folder or delete it")
    work = out.with_name(f"{out.name}.{os.getpid()}.partial")
    work.mkdir(parents=True)
    try:
        tokenizer = _tokenizer(config, progress)
        tokenizer.save_pretrained(work / "tokenizer")
        dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
        end = end_token(tokenizer)
        writers: dict[Split, _ShardWriter] = {
            "train": _ShardWriter(work, "train", dtype),
            "validation": _ShardWriter(work, "validation", dtype),
        }
        for done, (split, ids) in enumerate(_encoded(config, tokenizer), start=1):
            writers[split].write([*ids, end])
            progress("tokenizing", done)
        manifest = {
            "format": FORMAT,
            "config": asdict(config),
            "dtype": dtype.str,
            "vocab_size": len(tokenizer),
            "splits": {split: writer.close() for split, writer in writers.items()},
        }
        for split in writers:
            if not manifest["splits"][split]["tokens"]:
                raise ValueError(f"{config.source}: no text for the {split} split; give more text or another share")
        (work / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return PreparedData(out)


def encode(source: str, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> PackedBlocks:
    """All of a source's text as sequences in memory, for an evaluation.

    Raises:
        ValueError: for a source without text, or too short.
    """
    ids: list[int] = []
    end = end_token(tokenizer)
    for batch in _batches(documents(source), ENCODE_BYTES):
        for encoded in tokenizer(
            [document.text for document in batch], add_special_tokens=False, verbose=False
        ).input_ids:
            ids += [*encoded, end]
    if not ids:
        raise ValueError(f"{source} holds no text")
    return PackedBlocks([np.asarray(ids, dtype=np.int64)], sequence_length)


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that joins documents.

    Raises:
        ValueError: for a tokenizer without one.
    """
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no end-of-text token to join documents with")
    return tokenizer.eos_token_id


def _key(config: DataConfig) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, asdict(config)]).encode())
    for document in documents(config.source):
        digest.update(hashlib.sha256(document.text.encode()).digest())
    return digest.hexdigest()[:16]


def _split(document: Document, validation_fraction: float) -> Split:
    # By content: a text that occurs twice falls on one side.
    digest = hashlib.sha256(document.text.encode()).digest()
    return "validation" if int.from_bytes(digest[:8]) < validation_fraction * 2**64 else "train"


def _tokenizer(config: DataConfig, progress: Progress) -> PreTrainedTokenizerBase:
    if config.tokenizer is not None:
        return AutoTokenizer.from_pretrained(config.tokenizer)

    def training_texts() -> Iterator[str]:
        for done, document in enumerate(documents(config.source), start=1):
            if _split(document, config.validation_fraction) == "train":
                progress("training the tokenizer", done)
                yield document.text

    return train_tokenizer(training_texts(), config.vocab_size)


def _encoded(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Split, list[int]]]:
    for batch in _batches(documents(config.source), ENCODE_BYTES):
        encoded = tokenizer([document.text for document in batch], add_special_tokens=False, verbose=False)
        for document, ids in zip(batch, encoded["input_ids"], strict=True):
            yield _split(document, config.validation_fraction), ids


def _batches(stream: Iterable[Document], size: int) -> Iterator[list[Document]]:
    batch, held = [], 0
    for document in stream:
        batch.append(document)
        held += len(document.text)
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


class _ShardWriter:
    def __init__(self, folder: Path, split: Split, dtype: np.dtype) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype
        self.shards: list[dict[str, Any]] = []
        self.documents = 0
        self._held: list[np.ndarray] = []
        self._held_tokens = 0

    def write(self, ids: list[int]) -> None:
        self._held.append(np.asarray(ids, dtype=self.dtype))
        self._held_tokens += len(ids)
        self.documents += 1
        if self._held_tokens >= SHARD_TOKENS:
            self._flush()

    def close(self) -> dict[str, Any]:
        if self._held:
            self._flush()
        tokens = sum(shard["tokens"] for shard in self.shards)
        return {"documents": self.documents, "tokens": tokens, "shards": self.shards}

    def _flush(self) -> None:
        data = np.concatenate(self._held)
        file = f"{self.split}-{len(self.shards):05}.bin"
        data.tofile(self.folder / file)
        self.shards.append({"file": file, "tokens": len(data), "sha256": hashlib.sha256(data.tobytes()).hexdigest()})
        self._held, self._held_tokens = [], 0
