"""What is said of a tokenizer that is not there."""

from pathlib import Path

import pytest

from foldrank.hf import tokenizers
from foldrank.hf.tokenizers import load_tokenizer


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c"])
def test_a_path_to_nowhere_is_no_name_on_the_hub(name: str) -> None:
    with pytest.raises(ValueError, match=r": there is no such folder, and no model on the hub has such a name$"):
        load_tokenizer(name)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json' is a file: name the folder that holds it$"):
        load_tokenizer(file)


def test_a_name_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "is_reachable", lambda: False)
    with pytest.raises(
        ValueError, match=r"'nobody/nothing' cannot be loaded: there is no such folder, and the hub cannot"
    ):
        load_tokenizer("nobody/nothing")
