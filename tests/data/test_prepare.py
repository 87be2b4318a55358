"""Text becomes shards once: split by content, complete or absent, refused when damaged."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from foldrank.data import shards
from foldrank.data import tokenizer as tokenizer_module
from foldrank.data.cache import cache_folder
from foldrank.data.config import DataConfig, SequenceFormat
from foldrank.data.corpus import documents
from foldrank.data.prepare import PreparedData, Split, prepare, prepared
from foldrank.data.tokenizer import END_OF_TEXT, train_tokenizer

SPLITS: tuple[Split, ...] = ("train", "validation")


@pytest.fixture
def config(corpus: Path) -> DataConfig:
    return DataConfig(source=str(corpus), vocab_size=300, validation_fraction=0.2)


@pytest.fixture(scope="module")
def data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    config = DataConfig(source=str(corpus), vocab_size=300, validation_fraction=0.2)
    return prepare(config, tmp_path_factory.mktemp("prepared") / "data")


def tokens(data: PreparedData, split: Split) -> list[int]:
    blocks = data.sequences(split, SequenceFormat(length=1))
    return [int(blocks[index]["input_ids"][0]) for index in range(len(blocks))]


def texts(data: PreparedData, split: Split) -> list[str]:
    """The documents of a split, decoded."""
    whole = str(data.tokenizer().decode(tokens(data, split)))
    assert whole.endswith(END_OF_TEXT)
    return whole.removesuffix(END_OF_TEXT).split(END_OF_TEXT)


def test_each_document_comes_back_on_one_side(data: PreparedData, corpus: Path) -> None:
    train, validation = (texts(data, split) for split in SPLITS)
    assert set(train).isdisjoint(validation)
    assert sorted(train + validation) == sorted(document.text for document in documents(DataConfig(source=str(corpus))))
    assert 3 <= len(validation) <= 30


def test_the_manifest_counts_what_is_there(data: PreparedData) -> None:
    for split in SPLITS:
        entry = data.manifest.splits[split]
        assert entry.documents == len(texts(data, split))
        assert entry.tokens == data.tokens(split) == len(tokens(data, split))
    assert data.manifest.vocab_size == len(data.tokenizer()) == 320
    assert data.manifest.dtype == "<u2"


def test_many_shards_hold_what_one_does(
    data: PreparedData, config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 700)
    monkeypatch.setattr(tokenizer_module, "BATCH_CHARACTERS", 1500)
    sharded = prepare(config, tmp_path / "data")
    assert len(sharded.manifest.splits["train"].shards) > 10
    for split in SPLITS:
        assert tokens(sharded, split) == tokens(data, split)
        form = SequenceFormat(length=64)
        one, other = sharded.sequences(split, form), data.sequences(split, form)
        assert len(one) == len(other)
        assert all(torch.equal(one[index]["input_ids"], other[index]["input_ids"]) for index in range(len(one)))


def test_equal_texts_fall_on_one_side(corpus: Path, tmp_path: Path) -> None:
    for number, document in enumerate(documents(DataConfig(source=str(corpus)))):
        for name in ("a", "z"):
            file = tmp_path / "twice" / name / f"{number}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(document.text)
    config = DataConfig(source=str(tmp_path / "twice"), vocab_size=300, validation_fraction=0.5)
    data = prepare(config, tmp_path / "data")
    train, validation = (texts(data, split) for split in SPLITS)
    assert set(train).isdisjoint(validation)
    assert all(train.count(text) == 2 for text in train)
    assert all(validation.count(text) == 2 for text in validation)


def test_a_document_keeps_its_side_when_others_come(corpus: Path, tmp_path: Path, data: PreparedData) -> None:
    shutil.copytree(corpus, tmp_path / "more")
    for number in range(20):
        (tmp_path / "more" / f"new{number}.txt").write_text(f"A new text {number}. " * 20)
    more = prepare(
        DataConfig(source=str(tmp_path / "more"), vocab_size=300, validation_fraction=0.2), tmp_path / "data"
    )
    for split in SPLITS:
        assert set(texts(data, split)) <= set(texts(more, split))


def test_the_tokenizer_never_saw_the_validation_split(data: PreparedData) -> None:
    expected = train_tokenizer(texts(data, "train"), 300)
    assert data.tokenizer().get_vocab() == expected.get_vocab()


def test_the_cache_is_keyed_by_text_and_settings(
    corpus: Path, config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLDRANK_CACHE", str(tmp_path / "cache"))
    shutil.copytree(corpus, tmp_path / "corpus")
    config = replace(config, source=str(tmp_path / "corpus"))
    stages: list[str] = []

    def spoken(stage: str, *_: object) -> None:
        stages.append(stage)

    first = prepared(config, spoken)
    assert first.folder.is_relative_to(cache_folder())
    assert stages
    stages.clear()
    assert prepared(config, spoken).folder == first.folder
    assert not stages, "a second call reads what is there"
    assert prepared(replace(config, vocab_size=321)).folder != first.folder
    assert prepared(replace(config, validation_fraction=0.3)).folder != first.folder
    file = next((tmp_path / "corpus").rglob("*.txt"))
    file.write_text(file.read_text() + "One line more.\n")
    assert prepared(config).folder != first.folder
    assert len(list((tmp_path / "cache" / "data").iterdir())) == 4


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("FOLDRANK_CACHE", "/a", "/a"),
        ("XDG_CACHE_HOME", "/b", "/b/foldrank"),
        ("HOME", "/c", "/c/.cache/foldrank"),
    ],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str) -> None:
    monkeypatch.delenv("FOLDRANK_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, value)
    assert cache_folder() == Path(expected)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"vocab_size": 20_000}, "too short for a vocabulary of 20000"),
        ({"validation_fraction": 1e-9}, "no text for the validation split"),
        ({"validation_fraction": 1 - 1e-9}, "too short|no text"),
        ({"source": "nowhere"}, "no such corpus: 'nowhere' is neither"),
    ],
)
def test_text_that_does_not_fit_leaves_nothing(
    config: DataConfig, tmp_path: Path, change: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        prepare(replace(config, **change), tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_prepare_does_not_overwrite(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(FileExistsError, match="data exists: choose another folder or delete it"):
        prepare(config, tmp_path / "data")


@pytest.mark.parametrize("damage", ["truncated", "longer", "missing"])
def test_a_shard_that_is_not_as_written_is_refused(data: PreparedData, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(data.folder, tmp_path / "data"))
    shard = folder / "train-00000.bin"
    whole = shard.read_bytes()
    shard.unlink()
    if damage != "missing":
        shard.write_bytes(whole[:-2] if damage == "truncated" else whole + b"\0\0")
    with pytest.raises(ValueError, match=r"train-00000\.bin is truncated or missing: delete .* and try again"):
        PreparedData(folder)


@pytest.mark.parametrize("manifest", [None, "", "{", "{}", '{"format": 0}'])
def test_a_damaged_manifest_is_refused(data: PreparedData, tmp_path: Path, manifest: str | None) -> None:
    folder = Path(shutil.copytree(data.folder, tmp_path / "data"))
    (folder / "manifest.json").unlink()
    if manifest is not None:
        (folder / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match="data"):
        PreparedData(folder)


@pytest.fixture(scope="module")
def large_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More entries than two bytes can number: the words from w0 to w69999."""
    vocabulary = {END_OF_TEXT: 0, **{f"w{number}": number + 1 for number in range(70_000)}}
    words = Tokenizer(WordLevel(vocabulary, unk_token=END_OF_TEXT))
    words.pre_tokenizer = WhitespaceSplit()
    folder = tmp_path_factory.mktemp("large")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END_OF_TEXT).save_pretrained(folder)
    return folder


def test_a_large_vocabulary_takes_four_bytes(large_tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    for number in range(12):
        (source / f"{number}.txt").write_text(f"w{number} w65535 w69999")
    config = DataConfig(source=str(source), tokenizer=str(large_tokenizer), validation_fraction=0.4)
    data = prepare(config, tmp_path / "data")
    assert data.manifest.dtype == "<u4"
    for split in SPLITS:
        ids = tokens(data, split)
        assert ids[1::4] == [65_536] * (len(ids) // 4)
        assert ids[2::4] == [70_000] * (len(ids) // 4)
    numbers = sorted(tokens(data, "train")[0::4] + tokens(data, "validation")[0::4])
    assert numbers == list(range(1, 13))
    size = (data.folder / "train-00000.bin").stat().st_size
    assert size == 4 * data.tokens("train")


def test_a_tokenizer_without_an_end_is_refused(config: DataConfig, tmp_path: Path) -> None:
    tokenizer: PreTrainedTokenizerBase = train_tokenizer(["no text"], 262)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="no end-of-text token to join documents with"):
        prepare(replace(config, tokenizer=str(tmp_path / "tokenizer")), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_shards_are_little_endian_numbers(data: PreparedData) -> None:
    raw = np.frombuffer((data.folder / "validation-00000.bin").read_bytes(), dtype="<u2")
    assert raw.tolist() == tokens(data, "validation")
    saved = json.loads((data.folder / "manifest.json").read_text())
    assert (saved["documents"], saved["dtype"]) == (data.manifest.documents, data.manifest.dtype)
