"""What a file is, how its bytes become text, and what is left out and counted (top of foldrank/data/files.py)."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from foldrank.data.config import DataConfig
from foldrank.data.corpus import documents
from foldrank.data.files import Tally
from tests.called import Foldrank
from tests.data.texts import some_texts

TEXTS = some_texts(30)
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]


def read(source: Path, **settings: Any) -> tuple[list[str], Tally]:
    tally = Tally()
    found = [document.text for document in documents(DataConfig(source=str(source), **settings), tally)]
    return found, tally


def test_one_bad_byte_costs_one_byte(tmp_path: Path) -> None:
    whole = " ".join(TEXTS).encode()
    (tmp_path / "a.txt").write_bytes(whole[:5000] + b"\xff" + whole[5000:])
    found, tally = read(tmp_path / "a.txt")
    assert "".join(found).encode() == whole
    assert (tally.bytes, tally.lost_bytes) == (len(whole) + 1, 1)


def test_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(("Übergrößenträger " * 100).encode("latin-1"))
    with pytest.raises(ValueError, match=r"400 of 1,700 bytes are neither UTF-8 .* in .*a\.txt: convert it"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["rows.JSONL", "rows.NDJson", "rows.Json", "rows.json"])
def test_endings_count_in_small_letters(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read(tmp_path / name)[0] == TEXTS


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\n".join(json.dumps(row, indent=4) for row in ROWS),
        "\n\n" + "  ".join(map(json.dumps, ROWS)),
        "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    ],
    ids=["list", "pretty list", "pretty objects", "objects on a line", "a line each in a list"],
)
def test_json_is_read_as_its_content_is(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    found, tally = read(tmp_path / "rows.json")
    assert found == TEXTS
    assert not tally.skipped


def test_a_long_value_over_many_reads(tmp_path: Path) -> None:
    text = "word " * 200_000
    (tmp_path / "one.json").write_text(json.dumps([{"text": text}, {"text": text + "end"}], indent=1))
    assert read(tmp_path / "one.json")[0] == [text, text + "end"]


def test_a_json_file_among_sources_stops_nothing(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number:02}.py").write_text(text)
    (tmp_path / "person.json").write_text(json.dumps({"name": "x", "notes": "y" * 900}))
    found, tally = read(tmp_path)
    assert found == TEXTS
    assert tally.skipped == {"no field 'text'": 1}


def test_links_are_followed_once_and_counted(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "corpus").mkdir()
    for number, text in enumerate(TEXTS[:6]):
        (tmp_path / ("corpus" if number < 2 else "elsewhere/deep") / f"{number}.txt").write_text(text)
    (tmp_path / "corpus" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "again").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "corpus" / "up").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "corpus" / "0-again.txt").symlink_to(tmp_path / "corpus" / "0.txt")
    os.mkfifo(tmp_path / "corpus" / "pipe")
    found, tally = read(tmp_path / "corpus")
    assert sorted(found) == sorted(TEXTS[:6])
    assert tally.skipped == {
        "link to a folder that is read already": 2,
        "link that leads nowhere": 1,
        "link to a file that is read already": 1,
        "no regular file": 1,
    }


@pytest.mark.parametrize(
    "column",
    [[b"bytes"] * 3, [["a", "list"]] * 3, [{"a": "struct"}] * 3, [1, 2, 3]],
    ids=["bytes", "list", "struct", "int"],
)
def test_a_parquet_column_that_is_no_text_is_named_with_its_type(tmp_path: Path, column: list[Any]) -> None:
    parquet.write_table(pyarrow.table({"text": column, "other": ["x"] * 3}), tmp_path / "rows.parquet")
    with pytest.raises(
        ValueError, match=r"the column 'text' holds no text; its columns are text \(.*\), other \(string\)"
    ):
        read(tmp_path / "rows.parquet")


def test_a_parquet_dictionary_of_texts_is_text(tmp_path: Path) -> None:
    column = pyarrow.array(TEXTS).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet")[0] == TEXTS


def test_a_long_window_of_zstandard_is_said(tmp_path: Path) -> None:
    (tmp_path / "big.txt").write_text("".join(TEXTS) * 200)
    command = ["zstd", "-q", "--ultra", "--long=31", "--zstd=wlog=31", "big.txt", "-o", "big.txt.zst"]
    try:
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no zstd")
    try:
        found, _ = read(tmp_path / "big.txt.zst")
    except ValueError as error:
        assert "was compressed with a window longer than is read: zstd -d --long=31" in str(error)  # noqa: PT017
    else:
        assert "".join(found) == "".join(TEXTS) * 200


def test_a_record_in_another_encoding_loses_its_bytes_alone(tmp_path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
    lines.append('{"text": "größer als die anderen"}'.encode("latin-1"))
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    found, tally = read(tmp_path / "rows.jsonl")
    assert found == [*TEXTS, "grer als die anderen"]
    assert tally.lost_bytes == 2
    assert not tally.skipped


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-8-sig"])
def test_byte_order_marks(tmp_path: Path, encoding: str) -> None:
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    (tmp_path / "a.txt").write_bytes(mark + TEXTS[0].encode(encoding))
    found, tally = read(tmp_path / "a.txt")
    assert found == [TEXTS[0]]
    assert tally.lost_bytes == 0


def test_nested_deep_is_a_record_that_is_lost(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in ROWS * 100) + "[" * 3000 + "]" * 3000 + "\n"
    )
    found, tally = read(tmp_path / "rows.jsonl")
    assert len(found) == 3000
    assert tally.skipped["invalid JSON"] + tally.skipped["no text"] == 1


def test_check_says_what_is_there_and_writes_nothing(tmp_path: Path, foldrank: Foldrank) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    (source / "a.txt").write_text("".join(TEXTS))
    (source / "rows.JSONL").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (source / "picture.png").write_bytes(b"\x89PNG\0\0")
    (source / "broken.txt.gz").write_bytes(b"no gzip")
    before = sorted(tmp_path.rglob("*"))
    found = foldrank("prepare", source, "--check", "--json").json
    assert sorted(tmp_path.rglob("*")) == before
    assert {kind: counts["files"] for kind, counts in found["kinds"].items()} == {
        "text": 1,
        "unreadable": 1,
        "binary": 1,
        "records": 1,
    }
    assert found["kinds"]["records"]["documents sampled"] == 20
    assert found["skipped"] == {"binary": 1}
    assert len(found["problems"]) == 1
    shown = foldrank("prepare", source, "--check")
    assert "would stop: " in shown.stdout


def test_a_tokenizer_that_knows_nothing_of_the_text_is_refused(tmp_path: Path, foldrank: Foldrank) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(BPE({"<end>": 0, "nothing": 1}, []))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "corpus").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "corpus" / f"{number}.txt").write_text(text)
    done = foldrank("prepare", tmp_path / "corpus", "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "data")
    assert (done.code, done.stderr.count("makes 0 tokens of")) == (2, 1)
    assert not (tmp_path / "data").exists()
