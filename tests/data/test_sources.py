"""Every kind of source gives the same documents, and what is no text is left out and counted."""

import bz2
import gzip
import json
import lzma
import sysconfig
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from foldrank.data import corpus, files, hub
from foldrank.data.config import DataConfig
from foldrank.data.corpus import documents, fingerprint
from foldrank.data.files import Tally
from tests.data.texts import read, some_texts, write_folder

TEXTS = some_texts(30)
COMPRESSED = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_hub_folder(folder: Path, splits: dict[str, list[str]]) -> Path:
    """A folder laid out as a data set's repository on the hub, in Parquet."""
    (folder / "data").mkdir(parents=True)
    for split, texts in splits.items():
        table = pyarrow.table({"text": texts, "id": range(len(texts))})
        parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def quiet_datasets() -> None:
    datasets.disable_progress_bars()


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_json_lines(tmp_path: Path, kind: str, suffix: str) -> None:
    file = tmp_path / f"rows{kind}{suffix}"
    file.write_bytes(COMPRESSED[suffix](json_lines([{"id": 1, "text": text} for text in TEXTS])))
    assert read(file) == TEXTS


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_text_file(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"one.txt{suffix}").write_bytes(COMPRESSED[suffix](TEXTS[0].encode()))
    assert read(tmp_path) == TEXTS[:1]


def test_frames_of_zstandard_one_after_another(tmp_path: Path) -> None:
    halves = (json_lines([{"text": text} for text in part]) for part in (TEXTS[:9], TEXTS[9:]))
    (tmp_path / "rows.jsonl.zst").write_bytes(b"".join(COMPRESSED[".zst"](half) for half in halves))
    assert read(tmp_path) == TEXTS


def test_parquet_of_several_row_groups(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"id": range(30), "body": TEXTS}), file, row_group_size=7)
    assert read(file, text_field="body") == TEXTS


def test_folder_is_read_in_the_order_of_names_without_hidden_files(tmp_path: Path) -> None:
    write_folder(tmp_path / "b", TEXTS[2:4])
    write_folder(tmp_path / "a", TEXTS[:2])
    write_folder(tmp_path / ".git", TEXTS[4:6])
    (tmp_path / ".hidden").write_text(TEXTS[7])
    assert read(tmp_path) == TEXTS[:4]


def test_text_file_alone_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CHUNK_CHARS", 500)
    whole = "".join(f"{number} {text}\n" for number, text in enumerate(TEXTS))
    (tmp_path / "book.txt").write_text(whole, encoding="utf-8")
    pieces = read(tmp_path / "book.txt")
    assert "".join(pieces) == whole
    assert len(pieces) > 10
    assert all(piece.endswith("\n") for piece in pieces)
    assert read(tmp_path) == [whole]  # a file of a folder is one document


def test_line_without_end_is_cut_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CHUNK_CHARS", 100)
    (tmp_path / "line.txt").write_text("0123456789" * 100)
    pieces = read(tmp_path / "line.txt")
    assert "".join(pieces) == "0123456789" * 100
    assert max(map(len, pieces)) <= 200


def test_site_packages_are_sources_and_prose() -> None:
    everything = sorted(Path(sysconfig.get_path("purelib")).rglob("*"))
    prose = {".md", ".rst", ".txt", "METADATA"}
    for source, endings in (("site-packages", {".py", *prose}), ("site-packages-prose", prose)):
        found = (path for path in everything if (path.suffix or path.name) in endings)
        usable = (path.read_text(encoding="utf-8") for path in found if path.stat().st_size > 100)
        assert read(source, max_documents=1)[0] == next(usable)


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    write_folder(tmp_path, TEXTS[:3])
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text(" \n one \n" + " " * 50)
    (tmp_path / "program.exe").write_bytes(b"MZ some program \0\0\0 with zeros")
    (tmp_path / "latin1.txt").write_bytes("Übergrößenträger".encode("latin-1"))
    rows: list[Any] = [{"text": TEXTS[3]}, {"text": None}, {"other": 1}, "no object", {"text": "half a pair: \ud800"}]
    (tmp_path / "rows.jsonl").write_bytes(json_lines(rows) + b'\n{"text": "cut')
    (tmp_path / "z.txt").write_text("plain " * 1000)
    tally = Tally()
    found = [document.text for document in documents(DataConfig(source=str(tmp_path)), tally)]
    assert found == [*TEXTS[:3], "bergrentrger", TEXTS[3], "half a pair: ", "plain " * 1000]
    reasons = {"near-empty": 2, "binary": 1, "no text": 2, "no field 'text'": 1, "invalid JSON": 1}
    assert tally.skipped == reasons
    assert tally.lost_bytes == 4 + 1 + len('{"text": "cut')


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".txt.bz2", ".jsonl.xz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("how", ["truncated", "not of its kind"])
def test_damaged_file_is_named(tmp_path: Path, suffix: str, how: str) -> None:
    file = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.table({"text": TEXTS}), file)
        whole = file.read_bytes()
    else:
        whole = COMPRESSED["." + suffix.rpartition(".")[2]](json_lines([{"text": text} for text in TEXTS]))
    file.write_bytes(whole[:-20] if how == "truncated" else b"this is something else")
    with pytest.raises(ValueError, match=rf"rows\{suffix} cannot be read, it may be damaged"):
        read(file)


def test_missing_field_names_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(json_lines([{"id": 1, "content": "a text of some length"}]))
    parquet.write_table(pyarrow.table({"id": [1], "content": ["a text of some length"]}), tmp_path / "rows.parquet")
    as_hub_folder(tmp_path / "hub", {"train": TEXTS})
    for file in ("rows.jsonl", "rows.parquet"):
        with pytest.raises(ValueError, match=rf"{file} has no field 'text' but 'id', 'content'"):
            read(tmp_path / file)
    with pytest.raises(ValueError, match="has no field 'body' but 'text', 'id'"):
        read(tmp_path / "hub", split="train", text_field="body")


@pytest.mark.usefixtures("quiet_datasets")
def test_data_sets(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(30))})
    rows.save_to_disk(tmp_path / "rows")
    datasets.DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(tmp_path / "dict")
    as_hub_folder(tmp_path / "hub", {"train": TEXTS, "test": TEXTS[:3]})
    assert read(tmp_path / "rows") == TEXTS
    assert read(tmp_path / "dict") == TEXTS
    assert read(tmp_path / "dict", split="test") == TEXTS[:3]
    assert read(tmp_path / "hub", split="train") == TEXTS
    assert read(tmp_path / "hub", split="test") == TEXTS[:3]


@pytest.mark.usefixtures("quiet_datasets")
@pytest.mark.parametrize("saved", ["as on the hub", "by save_to_disk"])
def test_validation_split_is_kept_out_of_training(tmp_path: Path, saved: str) -> None:
    splits = {"train": TEXTS, "validation": [*some_texts(4, seed=2), TEXTS[5], TEXTS[8]]}
    if saved == "as on the hub":
        as_hub_folder(tmp_path / "data", splits)
    else:
        parts = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in splits.items()}
        datasets.DatasetDict(parts).save_to_disk(tmp_path / "data")  # pyright: ignore[reportCallIssue, reportArgumentType]
    tally = Tally()
    config = DataConfig(source=str(tmp_path / "data"), validation_split="validation")
    found = list(documents(config, tally))
    assert [document.text for document in found if document.split == "validation"] == splits["validation"]
    training = [document.text for document in found if document.split == "train"]
    assert training == [text for text in TEXTS if text not in splits["validation"]]
    assert tally.skipped == {"in the validation split": 2}


@pytest.mark.usefixtures("quiet_datasets")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "nothing"}, "Bad split: nothing. Available splits: .*train"),
        ({"subset": "en"}, "'en' not found"),
    ],
)
def test_unknown_split_or_subset(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    as_hub_folder(tmp_path / "hub", {"train": TEXTS})
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "hub", **settings)


@pytest.mark.usefixtures("quiet_datasets")
def test_saved_data_set_without_the_split(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(tmp_path / "rows")
    datasets.DatasetDict({"all": rows}).save_to_disk(tmp_path / "dict")
    with pytest.raises(ValueError, match="no split 'train' but all"):
        read(tmp_path / "dict")
    with pytest.raises(ValueError, match="it has no splits"):
        read(tmp_path / "rows", validation_split="validation")


@pytest.mark.parametrize(("module", "file"), [("datasets", "hub"), ("pyarrow.parquet", "rows.parquet")])
def test_extra_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, file: str) -> None:
    as_hub_folder(tmp_path / "hub", {"train": TEXTS})
    (tmp_path / "rows.parquet").touch()
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ValueError, match=r"needs the package \w+: pip install 'foldrank\[data\]'"):
        read(tmp_path / file, **({"split": "train"} if file == "hub" else {}))


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("/no/such/folder", {}, "no such corpus: '/no/such/folder'"),
        ("nothing", {}, "no such corpus: 'nothing'"),
        ("stdlib", {"split": "train"}, "'stdlib' is no Hugging Face data set"),
    ],
)
def test_source_that_is_none(source: str, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(source, **settings)


@pytest.mark.parametrize(
    ("source", "is_one"),
    [("allenai/c4", True), ("allenai/c4@1588ec4", True), ("c4", False), ("./allenai/c4", False), ("a/b/c", False)],
)
def test_what_a_name_on_the_hub_looks_like(source: str, is_one: bool) -> None:
    assert hub.is_data_set(DataConfig(source=source)) == is_one


def test_parts_are_chosen_by_content(tmp_path: Path) -> None:
    texts = some_texts(400)
    write_folder(tmp_path / "once", texts)
    write_folder(tmp_path / "twice", [*reversed(texts), *texts])
    once = {document.text: document.split for document in documents(DataConfig(source=str(tmp_path / "once")))}
    config = DataConfig(source=str(tmp_path / "twice"))
    assert all(once[document.text] == document.split for document in documents(config))
    held_out = [text for text, split in once.items() if split == "validation"]
    assert 4 <= len(held_out) <= 32  # 16 expected of 400 at 4 %


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "folder"])
def test_share_grows_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(files, "BATCH_ROWS", 4)
    lines = json_lines([{"text": text} for text in TEXTS])
    (tmp_path / "rows.jsonl").write_bytes(lines)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "rows.parquet")
    write_folder(tmp_path / "folder", TEXTS)
    shares = [document.fraction or 0.0 for document in documents(DataConfig(source=str(tmp_path / name)))]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert shares[0] < 0.2 or name.startswith("rows.jsonl")  # so short a file is read at once


def test_share_of_a_limited_number(tmp_path: Path) -> None:
    write_folder(tmp_path, TEXTS)
    found = list(documents(DataConfig(source=str(tmp_path), max_documents=10)))
    assert [document.text for document in found] == TEXTS[:10]
    assert found[4].fraction == 0.5
    assert found[-1].fraction == 1.0


def test_fingerprint_is_of_names_and_content(tmp_path: Path) -> None:
    config = DataConfig(source=str(write_folder(tmp_path / "a", TEXTS)))
    before = fingerprint(config)
    assert fingerprint(DataConfig(source=str(write_folder(tmp_path / "b", TEXTS)))) == before
    (tmp_path / "a" / "0003.txt").write_text("altered")
    assert fingerprint(config) != before
    assert fingerprint(DataConfig(source="owner/name")) == b""
