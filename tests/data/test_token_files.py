"""Token ids that exist already: read as they are, written as others read them, and refused where they are none."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foldrank.data.config import DataConfig, Split
from foldrank.data.megatron import HEADER, MAGIC
from foldrank.data.prepare import prepare
from foldrank.data.prepared import PreparedData
from tests.data.texts import some_texts, write_folder

from ..called import Foldrank
from ..small_runs import SMALL_MODEL

END = 9


def documents_of(data: PreparedData, split: Split) -> list[list[int]]:
    return [
        part.tolist()
        for tokens, ends in data.shards_of(split)
        for part in np.split(np.asarray(tokens), np.asarray(ends)[:-1])
    ]


def some_ids(count: int, seed: int = 0, below: int = 400) -> list[list[int]]:
    """Documents of ids without the end token."""
    draw = np.random.default_rng(seed)
    return [[int(i) for i in draw.integers(10, below, size=draw.integers(1, 60))] for _ in range(count)]


def raw(documents: list[list[int]], dtype: str = "<u2", *, ended: bool = True) -> bytes:
    flat = [token for document in documents for token in (*document, END)]
    return np.array(flat if ended else flat[:-1], dtype=dtype).tobytes()


def megatron(folder: Path, name: str, documents: list[list[int]], code: int = 8, dtype: str = "<u2") -> None:
    """As Megatron-LM's own writer lays it out, spelled here anew; a document of two sequences now and then."""
    sequences, firsts = [], [0]
    for number, document in enumerate(documents):
        half = len(document) // 2 if number % 3 == 0 else 0
        sequences += [part for part in (document[:half], document[half:]) if part]
        firsts.append(len(sequences))
    lengths = [len(sequence) for sequence in sequences]
    size = np.dtype(dtype).itemsize
    places = [size * sum(lengths[:number]) for number in range(len(lengths))]
    (folder / f"{name}.bin").write_bytes(np.array(sum(sequences, []), dtype=dtype).tobytes())  # noqa: RUF017 - small
    (folder / f"{name}.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(lengths), len(firsts))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(places)}q", *places)
        + struct.pack(f"<{len(firsts)}q", *firsts)
    )


def ids_alone(source: Path, form: str, **settings: Any) -> DataConfig:
    values = {"vocab_size": 400, "end_token": END, "validation_fraction": 0.3, **settings}
    return DataConfig(source=str(source), token_format=form, **values)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("form", "dtype"), [("uint16", "<u2"), ("uint32", "<u4"), ("megatron", "<i4")])
def test_every_document_comes_back_on_one_side(form: str, dtype: str, tmp_path: Path) -> None:
    documents = some_ids(60)
    if form == "megatron":
        megatron(tmp_path, "all", documents, code=4, dtype=dtype)
    else:
        (tmp_path / "all.bin").write_bytes(raw(documents, dtype, ended=False))
    data = prepare(ids_alone(tmp_path / "all.bin", form), tmp_path / "out")
    both = documents_of(data, "train") + documents_of(data, "validation")
    assert sorted(both) == sorted([*document, END] for document in documents)
    assert min(len(documents_of(data, split)) for split in ("train", "validation")) > 5
    assert data.tokenizer().decode([17, 4]) == "17 4"
    assert data.tokenizer()("17 4").input_ids == [17, 4]


def test_in_a_folder_val_is_held_out(tmp_path: Path) -> None:
    one, other = some_ids(30), some_ids(9, seed=1)
    (tmp_path / "train.bin").write_bytes(raw(one))
    (tmp_path / "val.bin").write_bytes(raw(other))
    data = prepare(ids_alone(tmp_path, "uint16"), tmp_path / "out")
    assert documents_of(data, "train") == [[*document, END] for document in one]
    assert documents_of(data, "validation") == [[*document, END] for document in other]


def test_a_data_set_with_input_ids(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    documents = some_ids(40)
    rows = datasets.Dataset.from_dict({"input_ids": documents, "other": [1] * 40})
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "saved"))
    data = prepare(ids_alone(tmp_path / "saved", "input_ids"), tmp_path / "out")
    both = documents_of(data, "train") + documents_of(data, "validation")
    assert sorted(both) == sorted([*document, END] for document in documents)


@pytest.mark.parametrize("form", ["megatron", "raw", "input_ids"])
def test_what_is_written_is_read_back(form: str, tmp_path: Path, tokenizer_folder: Path, foldrank: Foldrank) -> None:
    if form == "input_ids":
        pytest.importorskip("pyarrow")
    texts = write_folder(tmp_path / "texts", some_texts(40))
    config = DataConfig(source=str(texts), tokenizer=str(tokenizer_folder), validation_fraction=0.3)
    data = prepare(config, tmp_path / "prepared")
    done = foldrank("prepare", tmp_path / "prepared", "--export", form, "--out", tmp_path / "files", "--json")
    assert done.json["dtype"] == "uint16"
    back = ["--token-format", "uint16" if form == "raw" else form, "--tokenizer", tmp_path / "files" / "tokenizer"]
    assert foldrank("prepare", tmp_path / "files", *back, "--out", tmp_path / "again").code == 0
    again = PreparedData(tmp_path / "again")
    for split in ("train", "validation"):
        assert documents_of(again, split) == documents_of(data, split)
    assert again.identity().tokenizer_sha256 == data.identity().tokenizer_sha256


def test_a_model_trains_on_numbers_alone(tmp_path: Path, foldrank: Foldrank) -> None:
    (tmp_path / "all.bin").write_bytes(raw(some_ids(80)))
    options = {**SMALL_MODEL, "data.source": tmp_path / "all.bin", "data.token_format": "uint16"}
    options |= {"data.vocab_size": 400, "data.end_token": END, "train.steps": 2, "train.sequence_length": 16}
    command = [part for name, value in options.items() for part in (f"--{name}", value)]
    refused = foldrank("pretrain", "demo", *command, "--out", tmp_path / "run")
    assert refused.code == 2
    assert "sample_prompt 'def ' has no token that this tokenizer knows" in refused.stderr
    assert not (tmp_path / "run").exists()
    trained = foldrank("pretrain", "demo", *command, "--out", tmp_path / "run", "--sample_prompt", "17 20", "--json")
    assert trained.json["params"] > 0
    assert all(part.isdecimal() for part in trained.json["sample"].split())


def without_end(folder: Path) -> DataConfig:
    (folder / "a.bin").write_bytes(np.arange(10, 90, dtype="<u2").tobytes())
    return ids_alone(folder / "a.bin", "uint16")


def odd_size(folder: Path) -> DataConfig:
    (folder / "a.bin").write_bytes(raw(some_ids(9)) + b"x")
    return ids_alone(folder / "a.bin", "uint16")


def empty(folder: Path) -> DataConfig:
    (folder / "a.bin").write_bytes(b"")
    return ids_alone(folder / "a.bin", "uint16")


def too_large(folder: Path) -> DataConfig:
    (folder / "a.bin").write_bytes(raw(some_ids(30, below=60_000)))
    return ids_alone(folder / "a.bin", "uint16")


def no_index(folder: Path) -> DataConfig:
    (folder / "a.bin").write_bytes(raw(some_ids(9)))
    return ids_alone(folder / "a.bin", "megatron")


def damaged_index(change: Callable[[bytes], bytes]) -> Callable[[Path], DataConfig]:
    def make(folder: Path) -> DataConfig:
        megatron(folder, "a", some_ids(9))
        index = folder / "a.idx"
        index.write_bytes(change(index.read_bytes()))
        return ids_alone(folder / "a", "megatron")

    return make


def below_zero(folder: Path) -> DataConfig:
    megatron(folder, "a", [[1, -2, 3], [4, 5]], code=4, dtype="<i4")
    return ids_alone(folder / "a", "megatron")


def no_file(folder: Path) -> DataConfig:
    return ids_alone(folder / "nowhere", "megatron")


def prepared_already(folder: Path) -> DataConfig:
    (folder / "a.bin").write_bytes(raw(some_ids(30)))
    data = prepare(ids_alone(folder / "a.bin", "uint16"), folder / "data")
    assert data.manifest.bytes_read == (folder / "a.bin").stat().st_size
    return ids_alone(folder / "data", "uint16")


def no_parquet(folder: Path) -> DataConfig:
    (folder / "a.parquet").write_bytes(b"PAR1 and no more")
    return ids_alone(folder, "input_ids")


FIRST = HEADER.size


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (without_end, "no token of .*a.bin is the end token 9"),
        (odd_size, "which are no tokens of 2 bytes each"),
        (empty, "0 bytes, which are no tokens"),
        (too_large, "the vocabulary ends with 399"),
        (no_index, "a.idx is missing"),
        (damaged_index(lambda content: b"X" + content[1:]), "does not begin with MMIDIDX"),
        (damaged_index(lambda content: content[:-3]), "bytes where its header says"),
        (damaged_index(lambda content: content[:9] + b"\x02" + content[10:]), "version 2 and dtype code 8"),
        (damaged_index(lambda content: content[:17] + b"\x07" + content[18:]), "dtype code 7"),
        (damaged_index(lambda content: content[:17] + b"\x04" + content[18:]), "do not follow one another"),
        (
            damaged_index(lambda content: content[:FIRST] + b"\xff" * 4 + content[FIRST + 4 :]),
            "sequences do not follow",
        ),
        (damaged_index(lambda content: content[:-8] + b"\xff" * 8), "documents do not follow one another"),
        (damaged_index(lambda _: MAGIC), "does not begin with MMIDIDX"),
        (below_zero, "holds the token -2"),
        (no_file, "holds no token ids"),
        (no_parquet, "a.parquet"),
        (prepared_already, "holds prepared data, which is read as it is: leave out token_format"),
    ],
)
def test_what_is_no_token_file_is_one_line(make: Callable[[Path], DataConfig], says: str, tmp_path: Path) -> None:
    config = make(tmp_path)
    with pytest.raises(ValueError, match=says) as refused:
        prepare(config, tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"end_token": None}, "need the tokenizer that they are of, or their vocab_size and end_token"),
        ({"tokenizer": "t5-base"}, "need the tokenizer that they are of, or"),
        ({"end_token": 400}, "end_token must be below vocab_size 400"),
        ({"stream": True}, "not streamed"),
    ],
)
def test_settings_of_token_ids_are_checked(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        ids_alone(tmp_path, "uint16", **settings)


def test_an_end_token_says_nothing_of_text() -> None:
    with pytest.raises(ValueError, match="end_token says something of token ids"):
        DataConfig(end_token=3)
