"""Fields of a row as token ids, and lists of ids as one tensor."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from foldrank.data.tokenizer import Encoder


def encode_fields(row: Mapping[str, Any], fields: Sequence[str], encoder: Encoder) -> list[list[int]]:
    """The token ids of each field, without special tokens. What spells one in a text is text, as in pre-training.

    Raises:
        ValueError: where one is missing, or no text.
    """
    for name in fields:
        if not isinstance(row.get(name), str):
            raise ValueError(f"{name!r} must be text, got {row.get(name)!r:.80}")
        check_text(row[name])
    return [ids[:-1].tolist() for ids in encoder([row[name] for name in fields])]


def check_text(text: str) -> None:
    """Refuses text that no file can hold.

    Raises:
        ValueError: quoting it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text!r:.80} holds half a character (a lone surrogate)") from error


def padded(ids: Iterable[Sequence[int]], fill: int) -> Tensor:
    """Rows of the longest one's length, filled behind.

    Shape:
        result (batch, time).
    """
    return pad_sequence([torch.tensor(row) for row in ids], batch_first=True, padding_value=fill)
