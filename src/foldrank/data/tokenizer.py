"""Byte-level BPE tokenizers trained here, any Hugging Face tokenizer, and documents to token ids at full speed."""

import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from foldrank.data.config import MULTIPLE
from foldrank.data.corpus import Document
from foldrank.data.manifest import MAX_ID
from foldrank.data.tokenizer_files import check_tokenizer_files

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
    """A byte-level BPE tokenizer with `vocab_size` entries: 256 bytes, the special tokens, and what the text yields; and
    reserved ones up to a multiple of 64.

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


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """A Hugging Face tokenizer by name or folder. No code that lies beside it is run, and nothing is asked.

    Raises:
        ValueError: where it cannot be loaded, naming the file that is wrong where one is.
    """
    if Path(name).is_dir():
        check_tokenizer_files(Path(name))
    try:
        tokenizer = _loaded(name)
        largest_id(tokenizer)
    except ValueError:
        raise
    except Exception as error:  # of a class whose methods take what they find
        raise ValueError(f"the tokenizer {str(name)!r} does not work: {' '.join(str(error).split())}") from error
    return tokenizer


def _loaded(name: str | Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as first:  # the libraries raise what they like, among it panics that are no Exception
        try:
            # A checkpoint's config may name code of its own, which our tokenizers do not need.
            return PreTrainedTokenizerFast.from_pretrained(name)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            line = " ".join(str(first).split())
            raise ValueError(f"the tokenizer {str(name)!r} cannot be loaded: {line[:200]}") from first


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id of its tokens, special ones included; there may be holes below it.

    Raises:
        ValueError: for ids that are no such numbers.
    """
    ids = tokenizer.get_vocab().values()
    if not ids or not all(isinstance(token, int) and 0 <= token < MAX_ID for token in ids):
        raise ValueError(f"the tokenizer {tokenizer.name_or_path} has ids that are not between 0 and {MAX_ID}")
    return max(ids)


def embedding_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Entries that an embedding needs for any text: one more than the largest id of a token that is not special, and
    of those special ones that we use. Others may lie beyond it: t5-base has 32,000 tokens and 100 of these.
    """
    ids = {*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids}
    used = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return 1 + max(*ids, *(token for token in used if isinstance(token, int)))


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a document.

    Raises:
        ValueError: for a tokenizer without one.
    """
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no end-of-text token to join documents with")
    return tokenizer.eos_token_id


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
        self.dtype = np.dtype("<u2" if largest_id(tokenizer) < 1 << 16 else "<u4")
        self._slow = tokenizer
        self._fast = _plain(tokenizer.backend_tokenizer) if isinstance(tokenizer, PreTrainedTokenizerFast) else None

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
            waiting.append((batch, pool.submit(encoder, [document.text for document in batch])))
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
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
