"""Byte-level BPE tokenizers trained here, and any Hugging Face tokenizer by name or folder."""

from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
"""Joins documents; also begins and ends a text, and pads."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `vocab_size` entries, of which 256 are bytes and one is the end of a text.

    Raises:
        ValueError: for a vocabulary smaller than the bytes, or text too short for one as large.
    """
    alphabet = ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise ValueError(f"vocab_size must be at least {len(alphabet) + 1} (all bytes and the end), got {vocab_size}")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.train_from_iterator(
        texts,
        BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False),
    )
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(
            f"this text is too short for a vocabulary of {vocab_size} entries: it yields {tokenizer.get_vocab_size()}"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
