"""Bytes by token: their sum over the ids of a text is the text's bytes, and what loses bytes is not counted."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from foldrank.data.tokenizer import train_tokenizer
from foldrank.hf.token_bytes import bytes_per_token

from ..called import Foldrank
from ..small_runs import Run

TEXTS = ["plain words and 12 numbers", "Größe: 数学 🎉\n\ttabs", "naïve café ▁ Ġ", "<|user|>"]


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """One of Llama 2's kind: spaces as ▁, what is unknown as bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special[:2])
    tokenizer.train_from_iterator(["plain words and numbers " * 50], trainer)
    vocabulary, merges = tokenizer.get_vocab(), []
    for token in special[2:]:
        vocabulary[token] = len(vocabulary)
    tokenizer.model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("text", TEXTS[:3])
def test_the_sum_over_a_text_is_its_bytes(text: str):
    for tokenizer in (train_tokenizer(TEXTS * 20, vocab_size=320), fallback_tokenizer()):
        counts = bytes_per_token(tokenizer)
        assert counts is not None
        ids = tokenizer(text.replace("▁", "_"), add_special_tokens=False).input_ids
        assert int(counts[ids].sum()) == len(text.replace("▁", "_").encode())
        assert counts[tokenizer.convert_tokens_to_ids([str(tokenizer.eos_token)])].tolist() == [0]


def test_special_tokens_stand_for_no_text():
    tokenizer = train_tokenizer(TEXTS * 20, vocab_size=320)
    counts = bytes_per_token(tokenizer)
    assert counts is not None
    assert int(counts[tokenizer("<|user|>", add_special_tokens=False).input_ids].sum()) == 0


def test_a_tokenizer_that_loses_bytes_is_not_counted():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert bytes_per_token(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")) is None


def test_evaluate_says_them(foldrank: Foldrank, finished_run: Run, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("Größe " * 300)
    result = foldrank("evaluate", finished_run.out / "folded", "--data", text, "--json").json
    # One document and its end are predicted but for the first token, which is of one byte here.
    bits = result["loss"] * result["tokens"] / 0.6931471805599453
    first = bits / result["bits_per_byte"]
    assert len(text.read_bytes()) - 3 <= first < len(text.read_bytes())
    assert "bits per byte" in foldrank("evaluate", finished_run.out / "folded").stdout
