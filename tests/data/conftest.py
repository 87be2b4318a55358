"""What the tests of the data share: a cache of their own, and a small tokenizer."""

from pathlib import Path

import pytest

from foldrank.data.tokenizer import train_tokenizer
from tests.data.texts import some_texts


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FOLDRANK_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 300 entries, in the Hugging Face format."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(some_texts(40, seed=1), 300).save_pretrained(folder)
    return folder
