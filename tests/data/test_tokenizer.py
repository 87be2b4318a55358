from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from foldrank.data.config import DataConfig
from foldrank.data.stream import encode
from foldrank.data.tokenizer import END_OF_TEXT, Encoder, train_tokenizer
from foldrank.hf.tokenizers import largest_id
from foldrank.recipes.model_config import ModelConfig
from foldrank.recipes.schema import Recipe
from foldrank.train.model import resolve_vocab_size

from ..called import Foldrank
from ..small_runs import Run

TEXTS = ["def function(argument):\n    return argument\n" * 20, "for number in numbers: print(number)\n" * 20]
ROUND_TRIPS = [
    "def function(argument):",
    " leading and trailing ",
    "tabs\tand\n\n\nnew lines\r\n",
    "Grüße, 世界, 🙂, e\u0301",
    "\x00\x7f\ufeff",
    "don't  , space  before . punctuation !",
    "",
]


@pytest.mark.parametrize("text", ROUND_TRIPS, ids=ascii)
def test_any_text_comes_back(text: str) -> None:
    tokenizer = train_tokenizer(TEXTS, 290)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < 290 for token in ids)


def test_it_is_as_large_as_asked_and_learned_from_the_text() -> None:
    tokenizer = train_tokenizer(TEXTS, 290)
    assert len(tokenizer) == 320
    reserved = [token for token in tokenizer.get_vocab() if token.startswith("<|reserved_")]
    assert len(reserved) == 30
    assert tokenizer.pad_token == "<|pad|>"
    assert {"<|system|>", "<|user|>", "<|assistant|>", "<|end_of_turn|>"} <= {*tokenizer.get_vocab()}
    assert len(tokenizer("function(argument)", add_special_tokens=False).input_ids) < 10
    assert tokenizer.eos_token == tokenizer.bos_token == END_OF_TEXT != tokenizer.pad_token
    assert tokenizer.eos_token_id == 0


def test_it_is_the_same_each_time_and_from_disk(tmp_path: Path) -> None:
    one, other = train_tokenizer(TEXTS, 290), train_tokenizer(iter(TEXTS), 290)
    assert one.get_vocab() == other.get_vocab()
    one.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read.get_vocab() == one.get_vocab()
    assert read.eos_token_id == one.eos_token_id
    for text in ROUND_TRIPS:
        assert read(text, add_special_tokens=False).input_ids == one(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(("vocab_size", "complaint"), [(261, "vocab_size must be at least 262"), (5000, "too short")])
def test_a_vocabulary_that_cannot_be_is_refused(vocab_size: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        train_tokenizer(TEXTS, vocab_size)


def test_encode_joins_documents_with_the_end(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("the second text")
    (tmp_path / "a.txt").write_text("the first text")
    tokenizer = train_tokenizer(TEXTS, 262)
    blocks = encode(DataConfig(source=str(tmp_path)), tokenizer, 31)
    assert len(blocks) == 1
    assert tokenizer.decode(blocks[0]["input_ids"]) == f"the first text{END_OF_TEXT}the second text{END_OF_TEXT}"


def test_encode_refuses_a_source_without_text(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match="holds no text"):
        encode(DataConfig(source=str(tmp_path)), train_tokenizer(TEXTS, 262), 8)


def with_ids(vocabulary: dict[str, int], **special: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel(vocabulary, unk_token="<end>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", **special)


def test_the_largest_id_decides_where_ids_have_holes() -> None:
    tokenizer = with_ids({"<end>": 0, "word": 70_000})
    assert largest_id(tokenizer) == 70_000
    assert Encoder(tokenizer)(["word word"])[0].tolist() == [70_000, 70_000, 0]
    assert resolve_vocab_size(Recipe(), tokenizer) == 70_001
    with pytest.raises(ValueError, match="whose tokens count 70001"):
        resolve_vocab_size(Recipe(model=ModelConfig(vocab_size=300)), tokenizer)


def test_a_padding_id_behind_the_vocabulary_is_counted() -> None:
    tokenizer = with_ids({"<end>": 0, "word": 1, "<pad>": 300}, pad_token="<pad>")
    assert resolve_vocab_size(Recipe(), tokenizer) == 301
    with pytest.raises(ValueError, match="whose tokens count 301"):
        resolve_vocab_size(Recipe(model=ModelConfig(vocab_size=300)), tokenizer)


def test_the_tokenizer_of_a_checkpoint_is_taken_without_a_question(
    foldrank: Foldrank, finished_run: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    out = tmp_path / "data"
    done = foldrank("prepare", corpus, "--tokenizer", finished_run.out / "folded", "--out", out, "--json")
    assert done.json["vocab_size"] == 320
