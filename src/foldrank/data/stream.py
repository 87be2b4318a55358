"""Text that is tokenized when it is needed: for an evaluation in memory, and for training without preparation."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor, from_numpy
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from foldrank.atomic import write_text
from foldrank.data.config import DataConfig, SequenceFormat, Split
from foldrank.data.corpus import INSTALLED, Document, documents, is_prepared
from foldrank.data.identity import DataIdentity, tokenizer_sha256
from foldrank.data.mixture import MixedData
from foldrank.data.prepare import Progress, prepared
from foldrank.data.prepared import PreparedData
from foldrank.data.sequences import PackedText, SequenceDataset, kept_apart, sequences_of
from foldrank.data.tokenizer import Encoder, encoded, pad_token
from foldrank.hf.tokenizers import load_tokenizer


def encode(config: DataConfig, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> PackedText:
    """All of a source's text as packed sequences in memory, for an evaluation; the last one is filled up.

    Raises:
        ValueError: for a source without text.
    """
    encoder = Encoder(tokenizer)
    parts = [ids for batch in encoded(documents(config), encoder) for _, ids in batch]
    if not parts:
        raise ValueError(f"{config.source} holds no text")
    return PackedText(np.concatenate(parts), sequence_length, pad_token(tokenizer))


def open_data(config: DataConfig, progress: Progress = lambda *_: None) -> "PreparedData | MixedData | StreamedData":
    """What training reads: prepared data, a mixture, or a stream where the settings ask for one."""
    if config.sources is not None:
        return MixedData(config)
    return StreamedData(config) if config.stream else prepared(config, progress)


FIRST_DOCUMENTS = 32
"""Documents by which a stream is recognized."""


def reopen_data(
    config: DataConfig,
    identity: DataIdentity,
    *,
    evaluation_text: Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress = lambda *_: None,
) -> "PreparedData | MixedData | StreamedData":
    """Opens the data that a run recorded: exactly that, also where its source has changed meanwhile.

    Args:
        config: the run's settings of the data.
        identity: what the run recorded of it.
        evaluation_text: of a stream, what `write_evaluation_text` wrote, if it did.
        tokenizer: of the checkpoint that is to be evaluated, with which a stream's evaluation text is read and its
            source is not; None to train on the data.
        progress: told how far a preparation is.

    Raises:
        ValueError: where the text or the tokenizer is another one now, naming both hashes.
    """
    if identity.kind == "stream":
        data = StreamedData(config, evaluation_text, tokenizer)
        if tokenizer is None or evaluation_text is None:
            identity.check(data.identity())
        return data
    if identity.kind == "mixture":
        data = MixedData(config)
        identity.check(data.identity())
        return data
    # What the run read, while it is there.
    if identity.folder is not None and is_prepared(Path(identity.folder)):
        with suppress(ValueError):
            data = PreparedData(Path(identity.folder))
            identity.check(data.identity())
            return data
    # Otherwise its source prepared anew, if that gives the same.
    data = prepared(config, progress)
    identity.check(data.identity())
    return data


def resolve_source(config: DataConfig) -> DataConfig:
    """The settings with absolute paths, so that they mean the same from another working folder."""
    sources = config.sources and tuple(
        replace(source, source=_absolute(source.source), name=source.label) for source in config.sources
    )
    return replace(
        config,
        source=_absolute(config.source),
        sources=sources,
        tokenizer=config.tokenizer and _absolute(config.tokenizer),
    )


def _absolute(name: str) -> str:
    builtin = name in ("stdlib", *INSTALLED)
    return name if builtin or not Path(name).exists() else str(Path(name).resolve())


class StreamedData:
    """Text as training data without preparation: packed, in the order of the source, the same in every run."""

    def __init__(
        self,
        config: DataConfig,
        evaluation_text: Path | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.config = config
        self.evaluation_text = evaluation_text
        self._tokenizer = tokenizer

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one that it was given, or that the settings name."""
        if self._tokenizer is not None:
            return self._tokenizer
        assert self.config.tokenizer is not None  # the settings refuse a stream without
        return load_tokenizer(self.config.tokenizer)

    def identity(self) -> DataIdentity:
        """What a run that trains on this was trained on, by its first documents."""
        first = hashlib.sha256()
        for document in islice(documents(self.config), FIRST_DOCUMENTS):
            first.update(document.digest)
        return DataIdentity(
            kind="stream",
            tokenizer_sha256=tokenizer_sha256(self.tokenizer()),
            source=self.config.source,
            subset=self.config.subset,
            split=self.config.split,
            first_documents_sha256=first.hexdigest(),
        )

    def write_evaluation_text(self, file: Path, tokens: int) -> None:
        """Writes the first held-out documents, as many as hold `tokens`, as JSON lines: a later evaluation reads them
        and not the source.
        """
        encoder, lines, held = Encoder(self.tokenizer()), [], 0
        for batch in encoded(self._held_out(), encoder):
            lines += [json.dumps({"text": document.text}) + "\n" for document, _ in batch]
            held += sum(len(ids) for _, ids in batch)
            if held >= tokens:
                break
        write_text(file, "".join(lines))

    def _held_out(self) -> Iterator[Document]:
        if self.evaluation_text is None:
            return (document for document in documents(self.config) if document.split == "validation")
        lines = self.evaluation_text.read_text(encoding="utf-8").splitlines()
        return (
            Document(text=json.loads(line)["text"], digest=b"", split="validation", fraction=None) for line in lines
        )

    def tokens(self, split: Split) -> None:  # noqa: ARG002
        """Unknown until all is read."""
        return

    def text_sha256(self) -> None:
        """Unknown until all is read."""
        return

    def training(self, form: SequenceFormat, *, seed: int, num_sequences: int) -> "PackedStream":  # noqa: ARG002
        """The first sequences of the training documents; their order is the source's, whatever the seed.

        Raises:
            ValueError: for another layout than packed.
        """
        if form.layout != "packed":
            raise ValueError(f"a stream is packed: prepare the text for the {form.layout} layout (data.stream: false)")
        return PackedStream(self.config, self.tokenizer(), form, num_sequences)

    def validation(self, form: SequenceFormat, tokens: int | None) -> Dataset[dict[str, Tensor]]:
        """The first validation documents, as many as hold `tokens`, in memory.

        Raises:
            ValueError: where their number is not limited.
        """
        if tokens is None:
            raise ValueError("evaluating on a stream needs a number of tokens (train.eval_tokens)")
        return _in_memory(self._held_out(), self.config, self.tokenizer(), form, tokens).take(tokens)

    def test(self, form: SequenceFormat, *, validation_tokens: int, tokens: int) -> Dataset[dict[str, Tensor]]:
        """The sequences of the held-out documents behind those of the validation, in memory.

        Raises:
            ValueError: where there are none.
        """
        both = _in_memory(self._held_out(), self.config, self.tokenizer(), form, validation_tokens + tokens)
        return both.skip(validation_tokens, tokens)


class PackedStream(IterableDataset[dict[str, Tensor]]):
    """The training documents of a source, tokenized on the fly and packed; they begin again when all are read.

    Each process that trains reads all of it and takes its share, so the order is the same for any number of them. To
    resume, the sequences already used are read again and dropped.

    Raises:
        ValueError: where more than one loader worker reads it, or the text is shorter than one sequence.
    """

    def __init__(
        self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, form: SequenceFormat, num_sequences: int
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.form = form
        self.num_sequences = num_sequences

    def num_tokens(self) -> int:
        """Tokens in all of them."""
        return self.num_sequences * self.form.length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError("a stream is read by one loader worker at most: set dataloader_num_workers to 0 or 1")
        encoder, length = Encoder(self.tokenizer), self.form.length
        mask_end = encoder.end if self.form.document_mask else None
        held, given = np.empty(0, dtype=np.int64), 0
        while given < self.num_sequences:
            training = (document for document in documents(self.config) if document.split == "train")
            before = given
            for batch in encoded(training, encoder):
                held = np.concatenate([held, *(ids for _, ids in batch)])
                num_rows = len(held) // length
                rows, held = np.split(held, [num_rows * length])
                for row in from_numpy(rows.astype(np.int64)).view(num_rows, length)[: self.num_sequences - given]:
                    given += 1
                    yield kept_apart({"input_ids": row, "labels": row}, mask_end)
                if given == self.num_sequences:
                    return
            if given == before:
                raise ValueError(f"{self.config.source} holds no training sequence of {length} tokens")


def _in_memory(
    stream: Iterable[Document],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    form: SequenceFormat,
    tokens: int | None = None,
) -> SequenceDataset:
    encoder = Encoder(tokenizer)
    parts: list[np.ndarray] = []
    held = 0
    for batch in encoded(stream, encoder):
        parts += [ids for _, ids in batch]
        # Of the padded layout each document gives a sequence's length at most.
        held += sum(min(len(ids), form.length) if form.layout == "padded" else len(ids) for _, ids in batch)
        if tokens is not None and held >= tokens:
            break
    if not parts:
        raise ValueError(f"{config.source} holds no text")
    document_offsets = np.cumsum([len(ids) for ids in parts])
    return sequences_of(
        [np.concatenate(parts)],
        [document_offsets],
        form,
        end_token=encoder.end,
        pad_token=pad_token(tokenizer),
    )
