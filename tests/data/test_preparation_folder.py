"""What a preparation may touch: its own folder, and nothing that a user has."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from foldrank.data import prepare as preparation
from foldrank.data.cache import cache_folder, lock_folder
from foldrank.data.config import DataConfig
from foldrank.data.identity import DataIdentity, tokenizer_sha256
from foldrank.data.prepare import prepare
from foldrank.data.tokenizer import train_tokenizer
from foldrank.hf.tokenizers import load_tokenizer

from ..called import Foldrank, tree


@pytest.fixture
def config(corpus: Path) -> DataConfig:
    return DataConfig(source=str(corpus), vocab_size=300, validation_fraction=0.2)


def test_a_folder_of_the_user_s_is_never_taken_for_an_unfinished_one(
    foldrank: Foldrank, corpus: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "data.partial"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    done = foldrank("prepare", corpus, "--out", tmp_path / "data", "--vocab-size", 300)
    assert (done.code, done.stderr.count("\n")) == (2, 1)
    assert f"{mine} exists and is no preparation of foldrank" in done.stderr
    assert tree(tmp_path) == {"data.partial": None, "data.partial/notes.txt": b"mine"}


def test_what_is_finished_waits_for_its_name(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "data", preparation._write

    def something_appears(*arguments: object) -> None:
        write(*arguments)  # pyright: ignore[reportArgumentType]
        out.mkdir()
        (out / "README").write_text("mine")

    monkeypatch.setattr(preparation, "_write", something_appears)
    with pytest.raises(
        OSError, match=r"data appeared while it was prepared .* All that was done is in .*data\.partial"
    ):
        prepare(config, out)
    assert (out / "README").read_text() == "mine"
    (out / "README").unlink()
    out.rmdir()
    monkeypatch.setattr(preparation, "_write", pytest.fail)  # nothing is done again
    prepare(config, out)
    assert sorted(os.listdir(tmp_path)) == ["data"]


def test_a_long_word_does_not_make_the_training_of_a_tokenizer_quadratic() -> None:
    draw = random.Random(0)
    base = [" ".join("".join(draw.choices("abcdefghij", k=5)) for _ in range(2000)) for _ in range(10)]
    plain = train_tokenizer(base, 300)
    began = time.perf_counter()
    train_tokenizer([*base, "".join(draw.choices("ACGT", k=2_000_000))], 300)
    assert time.perf_counter() - began < 30  # before, an hour
    assert train_tokenizer(base, 300).get_vocab() == plain.get_vocab()


def test_a_home_that_is_not_there_matters_to_nothing_that_names_its_cache(corpus: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    environment |= {"FOLDRANK_CACHE": str(tmp_path / "cache"), "HOME": "/proc/none"}
    command = [sys.executable, "-m", "foldrank.cli", "prepare", str(corpus), "--out", str(tmp_path / "data")]
    done = subprocess.run(
        [*command, "--vocab-size", "300"], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_locks_lie_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDRANK_CACHE", "/proc/none")
    assert cache_folder() == Path("/proc/none")
    assert os.access(lock_folder(), os.W_OK)


def test_a_tokenizer_has_one_hash_wherever_it_lies(config: DataConfig, tmp_path: Path) -> None:
    data = prepare(config, tmp_path / "data")
    data.tokenizer().save_pretrained(tmp_path / "copy")
    assert tokenizer_sha256(load_tokenizer(tmp_path / "copy")) == data.identity().tokenizer_sha256
    other = train_tokenizer(["some other text " * 500 + "with words"], 270)
    assert tokenizer_sha256(other) != data.identity().tokenizer_sha256


@pytest.mark.parametrize(
    "values", [{}, {"kind": "other", "tokenizer_sha256": "a"}, {"kind": "stream", "tokenizer_sha256": 3}, {"x": 1}]
)
def test_an_identity_of_the_wrong_kind_is_one_line(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^DataIdentity: "):
        DataIdentity.from_dict(values)
