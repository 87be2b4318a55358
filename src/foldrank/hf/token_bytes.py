"""How many bytes of text each token stands for, so that losses compare across tokenizers: bits per byte.

It is known of tokenizers that write every byte: those that work on bytes (GPT-2's kind, and those trained here), and
those that fall back to bytes (Llama 2's kind). Bytes are of the text as the tokenizer normalizes it.
"""

import re
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from foldrank.hf.tokenizers import largest_id
from foldrank.structured import parse_json

BYTE = re.compile(r"<0x[0-9A-F]{2}>")

SPACE = "▁"
"""What stands for a space in vocabularies of SentencePiece."""


def bytes_per_token(tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
    """Bytes by id, 0 of special tokens and of ids that are none; None where the tokenizer loses bytes or does not tell.

    Shape:
        result (largest id + 1,).
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    decoder = parse_json(backend.to_str()).get("decoder") or {}
    kinds = {part.get("type") for part in (decoder, *decoder.get("decoders", ()))}
    if not kinds & {"ByteLevel", "ByteFallback"}:
        return None
    on_bytes = "ByteLevel" in kinds
    counts = torch.zeros(largest_id(tokenizer) + 1, dtype=torch.long)
    for token, number in tokenizer.get_vocab().items():
        # On bytes each character of a token stands for one.
        one = on_bytes or BYTE.fullmatch(token) is not None
        counts[number] = (len(token) if on_bytes else 1) if one else len(token.replace(SPACE, " ").encode())
    for number, added in backend.get_added_tokens_decoder().items():
        counts[number] = 0 if added.special else len(added.content.encode())
    return counts
