"""Text that is tokenized when it is needed: for an evaluation in memory, and for training without preparation."""

from collections.abc import Iterable, Iterator

import numpy as np
from torch import Tensor, from_numpy
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from foldrank.data.config import DataConfig, Layout, Split
from foldrank.data.corpus import Document, documents
from foldrank.data.prepare import Progress, prepared
from foldrank.data.prepared import PreparedData
from foldrank.data.sequences import SequenceDataset, layout_of
from foldrank.data.tokenizer import Encoder, encoded, pad_token


def encode(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, sequence_length: int, layout: Layout = "packed"
) -> SequenceDataset:
    """All of a source's text as sequences in memory, for an evaluation.

    Raises:
        ValueError: for a source without text, or too short.
    """
    return _in_memory(documents(config), config, tokenizer, sequence_length, layout)


def open_data(config: DataConfig, progress: Progress = lambda *_: None) -> "PreparedData | StreamedData":
    """What training reads: prepared data, or a stream where the settings ask for one."""
    return StreamedData(config) if config.stream else prepared(config, progress)


class StreamedData:
    """Text as training data without preparation: packed, in the order of the source, the same in every run."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the settings name."""
        return AutoTokenizer.from_pretrained(self.config.tokenizer)

    def tokens(self, split: Split) -> None:  # noqa: ARG002
        """Unknown until all is read."""
        return

    def text_sha256(self) -> None:
        """Unknown until all is read."""
        return

    def training(self, sequence_length: int, layout: Layout, *, seed: int, num_sequences: int) -> "PackedStream":  # noqa: ARG002
        """The first sequences of the training documents; their order is the source's, whatever the seed.

        Raises:
            ValueError: for the padded layout.
        """
        if layout != "packed":
            raise ValueError("a stream is packed: prepare the text for the padded layout (data.stream: false)")
        return PackedStream(self.config, self.tokenizer(), sequence_length, num_sequences)

    def validation(self, sequence_length: int, layout: Layout, tokens: int | None) -> Dataset[dict[str, Tensor]]:
        """The first validation documents, as many as hold `tokens`, in memory.

        Raises:
            ValueError: where their number is not limited.
        """
        if tokens is None:
            raise ValueError("evaluating on a stream needs a number of tokens (train.eval_tokens)")
        held_out = (document for document in documents(self.config) if document.split == "validation")
        return _in_memory(held_out, self.config, self.tokenizer(), sequence_length, layout, tokens).first(tokens)

    def test(
        self,
        sequence_length: int,
        layout: Layout,
        *,
        validation_tokens: int,
        tokens: int,
    ) -> Dataset[dict[str, Tensor]]:
        """The sequences of the held-out documents behind those of the validation, in memory.

        Raises:
            ValueError: where there are none.
        """
        held_out = (document for document in documents(self.config) if document.split == "validation")
        both = _in_memory(held_out, self.config, self.tokenizer(), sequence_length, layout, validation_tokens + tokens)
        return both.behind(validation_tokens, tokens)


class PackedStream(IterableDataset[dict[str, Tensor]]):
    """The training documents of a source, tokenized on the fly and packed; they begin again when all are read.

    Each process that trains reads all of it and takes its share, so the order is the same for any number of them. To
    resume, the sequences already used are read again and dropped.

    Raises:
        ValueError: where more than one loader worker reads it, or the text is shorter than one sequence.
    """

    def __init__(
        self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, sequence_length: int, num_sequences: int
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.num_sequences = num_sequences

    def num_tokens(self) -> int:
        """Tokens in all of them."""
        return self.num_sequences * self.sequence_length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError("a stream is read by one loader worker at most: set dataloader_num_workers to 0 or 1")
        encoder = Encoder(self.tokenizer)
        held, given = np.empty(0, dtype=np.int64), 0
        while given < self.num_sequences:
            training = (document for document in documents(self.config) if document.split == "train")
            before = given
            for batch in encoded(training, encoder):
                held = np.concatenate([held, *(ids for _, ids in batch)])
                whole = len(held) // self.sequence_length
                rows, held = np.split(held, [whole * self.sequence_length])
                for row in from_numpy(rows.astype(np.int64)).view(whole, self.sequence_length)[
                    : self.num_sequences - given
                ]:
                    given += 1
                    yield {"input_ids": row, "labels": row}
                if given == self.num_sequences:
                    return
            if given == before:
                raise ValueError(f"{self.config.source} holds no training sequence of {self.sequence_length} tokens")


def _in_memory(
    stream: Iterable[Document],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    layout: Layout,
    tokens: int | None = None,
) -> SequenceDataset:
    encoder = Encoder(tokenizer)
    parts: list[np.ndarray] = []
    held = 0
    for batch in encoded(stream, encoder):
        parts += [ids for _, ids in batch]
        # Of the padded layout each document gives a sequence's length at most.
        held += sum(len(ids) if layout == "packed" else min(len(ids), sequence_length) for _, ids in batch)
        if tokens is not None and held >= tokens:
            break
    if not parts:
        raise ValueError(f"{config.source} holds no text")
    ends = np.cumsum([len(ids) for ids in parts])
    return layout_of(
        layout,
        [np.concatenate(parts)],
        [ends],
        sequence_length,
        end_token=encoder.end,
        pad_token=pad_token(tokenizer),
    )
