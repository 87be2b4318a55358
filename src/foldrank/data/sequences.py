"""Prepared tokens as sequences: the layouts of a split."""

from abc import abstractmethod
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from foldrank.data.best_fit import best_fit
from foldrank.data.config import SequenceFormat

IGNORED = -100
"""Label of a position that does not count."""


class SequenceDataset(Dataset[dict[str, Tensor]]):
    """A split as sequences of one length.

    Args:
        shards: arrays of token ids, in order, each made of whole documents that end in the end token.
        sequence_length: positions a sequence.
        mask_end: the end token, where the documents of a sequence are kept apart (`kept_apart`); None: they are not.

    Shape:
        an item is `input_ids` and `labels`, int64 (sequence_length,), and `position_ids` where they are kept apart.
    """

    def __init__(self, shards: list[np.ndarray], sequence_length: int, mask_end: int | None = None) -> None:
        self.shards = shards
        self.shard_offsets = np.cumsum([0, *(len(shard) for shard in shards)])
        self.sequence_length = sequence_length
        self.mask_end = mask_end

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return kept_apart(self.item(index), self.mask_end)

    @abstractmethod
    def item(self, index: int) -> dict[str, Tensor]:
        """A sequence, its documents not kept apart."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def num_tokens(self, indices: np.ndarray) -> int:
        """Tokens in these sequences, padding left out.

        Shape:
            indices: integers, (any number,).
        """

    @abstractmethod
    def take(self, tokens: int | None) -> Dataset[dict[str, Tensor]]:
        """The first sequences, as many as hold `tokens` and one at least; all where that is None or too many."""

    def skip(self, skipped: int, tokens: int) -> Dataset[dict[str, Tensor]]:
        """The sequences after `take(skipped)`, as many as hold `tokens`, or all that there are.

        Raises:
            ValueError: where there are none.
        """
        start, stop = (len(self.take(count)) for count in (skipped, skipped + tokens))  # pyright: ignore[reportArgumentType]
        if start == stop:
            raise ValueError(
                f"nothing is held out behind the {skipped} tokens of the validation: lower train.eval_tokens, or hold "
                "out more (data.validation_fraction)"
            )
        return Subset(self, range(start, stop))

    def read(self, start: int, count: int) -> Tensor:
        """Tokens of the shards as if they were one array.

        Shape:
            int64, (count,).
        """
        out = np.empty(count, dtype=np.int64)
        shard = int(np.searchsorted(self.shard_offsets, start, side="right")) - 1
        filled = 0
        while filled < count:
            offset = start + filled - int(self.shard_offsets[shard])
            part = self.shards[shard][offset : offset + count - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1
        return torch.from_numpy(out)

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as the array: give worker processes the name of the file instead.
        return {name: _by_name(value) for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {name: _opened(value) for name, value in state.items()}


class PackedBlocks(SequenceDataset):
    """Documents joined by end tokens, cut into blocks; a rest shorter than a block is left out.

    Raises:
        ValueError: for a split shorter than one block.
    """

    def __init__(self, shards: list[np.ndarray], sequence_length: int, mask_end: int | None = None) -> None:
        super().__init__(shards, sequence_length, mask_end)
        if len(self) == 0:
            raise ValueError(f"a split of {self.shard_offsets[-1]} tokens holds no sequence of {sequence_length}")

    def __len__(self) -> int:
        return int(self.shard_offsets[-1]) // self.sequence_length

    def item(self, index: int) -> dict[str, Tensor]:
        ids = self.read(index * self.sequence_length, self.sequence_length)
        return {"input_ids": ids, "labels": ids}

    def num_tokens(self, indices: np.ndarray) -> int:
        return len(indices) * self.sequence_length

    def take(self, tokens: int | None) -> Dataset[dict[str, Tensor]]:
        return self if tokens is None else _subset(self, max(1, tokens // self.sequence_length))


class PackedText(Dataset[dict[str, Tensor]]):
    """All of a text for an evaluation: every token but the first is predicted once.

    Each block begins with the last token of the one before it. The last, shorter than the others, is filled up, out of
    the loss.
    """

    def __init__(self, ids: np.ndarray, sequence_length: int, pad_token: int) -> None:
        self.ids = torch.from_numpy(ids.astype(np.int64))
        self.sequence_length = sequence_length
        self.pad_token = pad_token

    def __len__(self) -> int:
        return -(-(len(self.ids) - 1) // (self.sequence_length - 1))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * (self.sequence_length - 1)
        block = self.ids[start : start + self.sequence_length]
        missing = (0, self.sequence_length - len(block))
        return {
            "input_ids": nn.functional.pad(block, missing, value=self.pad_token),
            "labels": nn.functional.pad(block, missing, value=IGNORED),
        }


class FilledSequences(SequenceDataset):
    """Sequences that text need not fill: what comes behind it is out of the loss and out of all counts."""

    @cached_property
    def filled(self) -> np.ndarray:
        """Tokens of each sequence, int64."""
        return self.count_filled()

    @abstractmethod
    def count_filled(self) -> np.ndarray:
        """Works out `filled`."""

    def ended(self, ids: Tensor, length: int) -> dict[str, Tensor]:
        """The item of a sequence whose first `length` tokens are text."""
        labels = ids.clone()
        labels[length:] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def num_tokens(self, indices: np.ndarray) -> int:
        return int(self.filled[indices].sum())

    def take(self, tokens: int | None) -> Dataset[dict[str, Tensor]]:
        if tokens is None:
            return self
        return _subset(self, int(np.searchsorted(np.cumsum(self.filled), tokens)) + 1)


class PaddedDocuments(FilledSequences):
    """One document a sequence, as in the published protocol.

    A longer document is cut so that its last token is the end token, as a tokenizer that adds one before it truncates
    does; a shorter one is filled up, and the filling is out of the loss by its label. There is no attention mask: the
    filling comes last, so a causal model never looks at it, and without a mask it takes its fast path.

    Args:
        shards: as for `SequenceDataset`.
        document_offsets: for each shard the positions after its documents' last tokens.
        sequence_length: positions a sequence.
        end_token: id that ends a document.
        pad_token: id to fill up with.
    """

    def __init__(
        self,
        shards: list[np.ndarray],
        document_offsets: list[np.ndarray],
        sequence_length: int,
        *,
        end_token: int,
        pad_token: int,
    ) -> None:
        super().__init__(shards, sequence_length)
        self.document_offsets = document_offsets
        self.end_token, self.pad_token = end_token, pad_token
        self.first_documents = np.cumsum([0, *(len(shard) for shard in document_offsets)])

    def __len__(self) -> int:
        return int(self.first_documents[-1])

    def item(self, index: int) -> dict[str, Tensor]:
        shard = int(np.searchsorted(self.first_documents, index, side="right")) - 1
        document_offsets, position = self.document_offsets[shard], index - int(self.first_documents[shard])
        start, end = int(document_offsets[position - 1]) if position else 0, int(document_offsets[position])
        length = min(end - start, self.sequence_length)
        ids = torch.full((self.sequence_length,), self.pad_token)
        ids[:length] = torch.from_numpy(self.shards[shard][start : start + length].astype(np.int64))
        ids[length - 1] = self.end_token
        return self.ended(ids, length)

    def count_filled(self) -> np.ndarray:
        parts = [np.diff(offsets, prepend=offsets.dtype.type(0)) for offsets in self.document_offsets]
        lengths = np.concatenate(parts)
        return np.minimum(lengths, self.sequence_length).astype(np.int64)


class BestFit(FilledSequences):
    """Whole documents, as many to a sequence as fit (best-fit packing, arXiv 2404.10830); the rest is filled up.

    A document longer than a sequence is cut into pieces, of which the last is packed like a document. The filling is
    out of the loss by its label, and comes last.

    Args:
        shards, document_offsets, sequence_length, pad_token: as for `PaddedDocuments`.
        mask_end: as for `SequenceDataset`.
    """

    def __init__(
        self,
        shards: list[np.ndarray],
        document_offsets: list[np.ndarray],
        sequence_length: int,
        *,
        pad_token: int,
        mask_end: int | None = None,
    ) -> None:
        super().__init__(shards, sequence_length, mask_end)
        self.pad_token = pad_token
        ends = [offset + start for offset, start in zip(document_offsets, self.shard_offsets[:-1], strict=True)]
        starts, lengths = _pieces(np.concatenate(ends).astype(np.int64), sequence_length)
        order, self.bin_offsets = best_fit(lengths, sequence_length)
        self.starts, self.lengths = starts[order], lengths[order]

    def __len__(self) -> int:
        return len(self.bin_offsets) - 1

    def item(self, index: int) -> dict[str, Tensor]:
        ids = torch.full((self.sequence_length,), self.pad_token)
        at = 0
        for piece in range(self.bin_offsets[index], self.bin_offsets[index + 1]):
            length = int(self.lengths[piece])
            ids[at : at + length] = self.read(int(self.starts[piece]), length)
            at += length
        return self.ended(ids, at)

    def count_filled(self) -> np.ndarray:
        return np.add.reduceat(self.lengths, self.bin_offsets[:-1])


def sequences_of(
    shards: list[np.ndarray],
    document_offsets: list[np.ndarray],
    form: SequenceFormat,
    *,
    end_token: int,
    pad_token: int,
) -> SequenceDataset:
    """The sequences of a format; the other arguments are those of `PaddedDocuments`.

    Raises:
        ValueError: for packed text shorter than one sequence.
    """
    mask_end = end_token if form.document_mask else None
    if form.layout == "packed":
        return PackedBlocks(shards, form.length, mask_end)
    if form.layout == "best-fit":
        return BestFit(shards, document_offsets, form.length, pad_token=pad_token, mask_end=mask_end)
    # One document a sequence: there is nothing to keep apart.
    return PaddedDocuments(shards, document_offsets, form.length, end_token=end_token, pad_token=pad_token)


def kept_apart(item: dict[str, Tensor], end_token: int | None) -> dict[str, Tensor]:
    """A sequence whose documents, which end in the end token, are kept apart (`SequenceFormat.document_mask`).

    Args:
        item: `input_ids` and `labels`.
        end_token: None: the sequence stays as it is.

    Shape:
        each (sequence_length,).
    """
    if end_token is None:
        return item
    ids = item["input_ids"]
    begins = torch.zeros_like(ids, dtype=torch.bool)
    begins[0], begins[1:] = True, ids[:-1] == end_token
    positions = torch.arange(len(ids))
    first = torch.where(begins, positions, 0).cummax(0).values
    return {
        "input_ids": ids,
        "labels": item["labels"].masked_fill(begins, IGNORED),
        "position_ids": positions - first,
    }


def _pieces(ends: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Where pieces of documents begin and how long they are, given where documents end: none is above `longest`."""
    lengths = np.diff(ends, prepend=0)
    counts = -(-lengths // longest)
    document = np.repeat(np.arange(len(ends)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = (ends - lengths)[document] + number * longest
    return starts, np.minimum(ends[document] - starts, longest)


def _subset(sequences: SequenceDataset, count: int) -> Dataset[dict[str, Tensor]]:
    return Subset(sequences, range(min(count, len(sequences))))


def _by_name(value: Any) -> Any:
    if isinstance(value, list):
        return [_by_name(item) for item in value]
    return _File(value) if isinstance(value, np.memmap) else value


def _opened(value: Any) -> Any:
    if isinstance(value, list):
        return [_opened(item) for item in value]
    return value.open() if isinstance(value, _File) else value


class _File:
    def __init__(self, array: np.memmap) -> None:
        self.name, self.dtype = array.filename, array.dtype

    def open(self) -> np.memmap:
        assert self.name is not None
        return np.memmap(self.name, dtype=self.dtype, mode="r")
