import sysconfig
from itertools import islice
from pathlib import Path

import pytest

from foldrank.data.corpus import documents


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b.txt", "c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    found = list(documents(str(tmp_path)))
    assert [document.name for document in found] == ["a/b.txt", "a/z.txt", "b.txt", "c"]
    assert found[0].text == "text of a/b.txt"


def test_a_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("some text")
    assert [document.text for document in documents(str(tmp_path / "one.txt"))] == ["some text"]


def test_what_is_no_text_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe\x00")
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    assert [document.name for document in documents(str(tmp_path))] == ["text.txt"]


def test_a_source_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="no such corpus: 'nowhere' is neither 'stdlib' nor a file nor a folder"):
        list(documents("nowhere"))


def test_the_standard_library_is_there_on_every_machine() -> None:
    found = list(islice(documents("stdlib"), 100))
    assert len(found) == 100
    assert [document.name for document in found] == sorted(document.name for document in found)
    assert not [document.name for document in found if "test/" in document.name or "site-packages" in document.name]
    text = (Path(sysconfig.get_path("stdlib")) / found[0].name).read_text(encoding="utf-8")
    assert found[0].text == text
