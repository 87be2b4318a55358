"""Byte-level BPE tokenizers trained here, any Hugging Face tokenizer, and documents to token ids at full speed."""

import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from foldrank.data.config import MULTIPLE
from foldrank.data.corpus import Document
from foldrank.hf.tokenizers import end_token, largest_id

END_OF_TEXT = "<|endoftext|>"
"""Joins documents; also begins and ends a text."""

PADDING = "<|pad|>"
"""Fills sequences up, in fine-tuning as well, where the end of a text must count."""

ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|end_of_turn|>")
"""Reserved, so that a chat template finds tokens of its own."""

BATCH_CHARACTERS = 1 << 20
"""Text handed to the tokenizer at a time: enough for every core, little in memory (some 40 bytes a character)."""

LONG_WORD = re.compile(rf"\S{{{1 << 10}}}")
"""What is cut before a tokenizer is trained, in time that grows with the square of a word's length: no word of a text,
but DNA, base64 and minified files have such."""

PREFETCH = 2
"""Batches in the tokenizer at once, so that a long document at the end of one leaves no core idle."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `vocab_size` entries: 256 bytes, special tokens, what the text yields. Others,
    reserved, fill it up to a multiple of 64.

    Raises:
        ValueError: for a vocabulary smaller than the bytes and special tokens, or text too short for one as large.
    """
    alphabet = ByteLevel.alphabet()
    special = [END_OF_TEXT, PADDING, *ROLES]
    if vocab_size < len(alphabet) + len(special):
        least = len(alphabet) + len(special)
        raise ValueError(f"vocab_size must be at least {least} (all bytes and special tokens), got {vocab_size}")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.train_from_iterator(
        map(_cut_long_words, texts),
        BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(
            f"this text is too short for a vocabulary of {vocab_size} entries: it yields {tokenizer.get_vocab_size()}"
        )
    tokenizer.add_special_tokens([f"<|reserved_{number}|>" for number in range(-vocab_size % MULTIPLE)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )


def _cut_long_words(text: str) -> str:
    return LONG_WORD.sub(r"\g<0> ", text)


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills a sequence up: the tokenizer's, else its end token (no loss and no output depends on it)."""
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else end_token(tokenizer)


class Encoder:
    """Texts to arrays of token ids, the end token last. What spells a special token in a text is text.

    Raises:
        ValueError: for a tokenizer without an end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.end = end_token(tokenizer)
        self.largest = largest_id(tokenizer)
        self.dtype = np.dtype("<u2" if self.largest < 1 << 16 else "<u4")
        self._slow = tokenizer
        self._fast = _plain(tokenizer.backend_tokenizer) if isinstance(tokenizer, PreTrainedTokenizerFast) else None

    def encode(self, batch: list[Document]) -> list[np.ndarray]:
        """The ids of documents, those that are there taken as they are.

        Raises:
            ValueError: where the tokenizer fails, and for ids that it does not have.
        """
        given = [document.ids for document in batch if document.ids is not None]
        if not given:
            return self([document.text for document in batch])
        if (largest := max(int(ids.max()) for ids in given)) > self.largest:
            raise ValueError(
                f"the source holds the token {largest:,}, and the vocabulary ends with {self.largest:,}: it is of "
                "another tokenizer, or of another token_format"
            )
        return [ids.astype(self.dtype) for ids in given]

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        try:
            return [np.asarray([*ids, self.end], dtype=self.dtype) for ids in self._ids(texts)]
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"the tokenizer {self._slow.name_or_path} fails on this text: {error}") from error

    def _ids(self, texts: list[str]) -> Iterable[list[int]]:
        if self._fast is not None:  # releases the GIL and uses every core
            return (encoding.ids for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False))
        return self._slow(texts, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    # A copy, because these settings belong to the object.
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def encoded(stream: Iterable[Document], encoder: Encoder) -> Generator[list[tuple[Document, np.ndarray]]]:
    """Documents with their token ids, in order, in batches; the next ones are read and encoded meanwhile."""
    waiting: deque[tuple[list[Document], Future[list[np.ndarray]]]] = deque()
    with ThreadPoolExecutor(PREFETCH) as pool:
        for batch in _batches(stream):
            waiting.append((batch, pool.submit(encoder.encode, batch)))
            if len(waiting) > PREFETCH:
                yield _done(*waiting.popleft())
        while waiting:
            yield _done(*waiting.popleft())


def _done(batch: list[Document], ids: Future[list[np.ndarray]]) -> list[tuple[Document, np.ndarray]]:
    return list(zip(batch, ids.result(), strict=True))


def _batches(stream: Iterable[Document]) -> Iterator[list[Document]]:
    batch, characters = [], 0
    for document in stream:
        batch.append(document)
        characters += document.size
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
