"""Fields of a row as token ids, and lists of ids as one tensor."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase


def encode_fields(row: Mapping[str, Any], fields: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of each field, without special tokens.

    Raises:
        ValueError: where one is no text.
    """
    texts = [row[name] for name in fields]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{' and '.join(fields)} must be text")
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def padded(ids: Iterable[Sequence[int]], fill: int) -> Tensor:
    """Rows of the longest one's length, filled behind.

    Shape:
        result (batch, time).
    """
    return pad_sequence([torch.tensor(row) for row in ids], batch_first=True, padding_value=fill)
