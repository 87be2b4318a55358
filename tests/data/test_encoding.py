"""Documents to token ids: as the tokenizer itself would, except that text never makes a special token."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from foldrank.data import tokenizer as encoding
from foldrank.data.config import DataConfig
from foldrank.data.corpus import documents
from foldrank.data.tokenizer import Encoder, encoded, pad_token
from tests.data.texts import some_texts, write_folder


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def test_ids_are_the_tokenizers_with_the_end_token_last(tokenizer: Any) -> None:
    texts = some_texts(20)
    expected = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    assert [ids.tolist() for ids in Encoder(tokenizer)(texts)] == expected
    assert Encoder(tokenizer).dtype == np.dtype("<u2")


def test_settings_of_the_tokenizer_do_not_cut_or_pad_and_stay_as_they_were(tokenizer: Any) -> None:
    expected = [ids.tolist() for ids in Encoder(tokenizer)(some_texts(5))]
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert [ids.tolist() for ids in Encoder(tokenizer)(some_texts(5))] == expected
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 4
    assert tokenizer.backend_tokenizer.padding["length"] == 9


@pytest.mark.parametrize("slow", [False, True])
def test_text_that_spells_a_special_token_is_text(tokenizer: Any, slow: bool) -> None:
    tokenizer = ByT5Tokenizer() if slow else tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast) != slow
    text = f"one {tokenizer.eos_token} two {tokenizer.pad_token} three"
    ids = Encoder(tokenizer)([text])[0].tolist()
    assert ids[-1] == tokenizer.eos_token_id
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids[:-1])
    assert tokenizer.decode(ids[:-1]) == text


def test_large_vocabulary_takes_four_bytes(tokenizer: Any) -> None:
    tokenizer.add_tokens([f"token {number}" for number in range(1 << 16)])
    ids = Encoder(tokenizer)(["token 65535"])[0]
    assert ids.dtype == np.dtype("<u4")
    assert ids.tolist() == [len(tokenizer) - 1, tokenizer.eos_token_id]


def test_tokenizer_without_an_end_token(tokenizer: Any) -> None:
    assert pad_token(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert pad_token(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end-of-text token"):
        Encoder(tokenizer)


@pytest.mark.parametrize("characters", [1, 700, 1 << 20])
def test_batches_keep_the_order(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, characters: int
) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", characters)
    config = DataConfig(source=str(write_folder(tmp_path, some_texts(50))))
    batches = list(encoded(documents(config), Encoder(tokenizer)))
    assert [document for batch in batches for document, _ in batch] == list(documents(config))
    expected = Encoder(tokenizer)([document.text for document in documents(config)])
    found = [ids for batch in batches for _, ids in batch]
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    assert (len(batches) == 1) == (characters == 1 << 20)
