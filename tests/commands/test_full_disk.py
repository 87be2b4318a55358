"""A disk without room: one line, exit code 2, what was there stays whole, nothing half-written."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from foldrank.atomic import write_text
from foldrank.hf.checkpoint import load
from foldrank.train.run_folder import save

from ..called import Foldrank, tree
from ..small_runs import Run


@contextmanager
def room_for(file_bytes: int) -> Iterator[None]:
    """Writing more than this to a file fails with an OSError, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_limit_works(tmp_path: Path) -> None:
    with room_for(1000), pytest.raises(OSError, match="too large"):
        (tmp_path / "file").write_bytes(bytes(1001))


def test_fold(foldrank: Foldrank, finished_run: Run, tmp_path: Path) -> None:
    before = tree(finished_run.out)
    with room_for(20_000):
        done = foldrank("fold", finished_run.out / "unfolded", "--out", tmp_path / "folded")
    assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "model.safetensors cannot be written" in done.stderr
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert tree(finished_run.out) == before


def test_preparing_the_data(
    foldrank: Foldrank, finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLDRANK_CACHE", str(tmp_path / "cache"))
    with room_for(20_000):
        done = foldrank("pretrain", finished_run.recipe, "--out", tmp_path / "run")
    assert done.code == 2
    assert "File too large" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    assert not [path for path in (tmp_path / "cache" / "data").rglob("*") if path.is_file()]


def test_a_run_keeps_nothing_half_written_and_goes_on_when_there_is_room(
    foldrank: Foldrank, finished_run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with room_for(20_000):
        done = foldrank("pretrain", finished_run.recipe, "--out", out)
    assert done.code == 2
    assert "the checkpoint of step 12 was not written" in done.stderr.splitlines()[-1]
    assert {path.name for path in out.iterdir()} <= {"config.yaml", "log.jsonl", "checkpoints"}
    assert list((out / "checkpoints").iterdir()) == []
    assert "--resume" in foldrank("pretrain", finished_run.recipe, "--out", out).stderr
    assert foldrank("pretrain", finished_run.recipe, "--out", out, "--resume").code == 0
    for name in ("folded/model.safetensors", "unfolded/model.safetensors"):
        assert (out / name).read_bytes() == (finished_run.out / name).read_bytes()


@pytest.mark.parametrize("file_bytes", [100, 1_000, 20_000])
def test_saving_a_model_is_all_or_nothing(finished_run: Run, tmp_path: Path, file_bytes: int) -> None:
    model, tokenizer = load(finished_run.out / "folded")
    with room_for(file_bytes), pytest.raises(OSError, match=r"folded was not written: .*go on with --resume"):
        save(model, tokenizer, tmp_path / "folded")
    assert list(tmp_path.iterdir()) == []
    save(model, tokenizer, tmp_path / "folded")
    AutoTokenizer.from_pretrained(tmp_path / "folded")
    save(model, tokenizer, tmp_path / "folded")  # again, over the first
    with room_for(file_bytes), pytest.raises(OSError, match="was not written"):
        save(model, tokenizer, tmp_path / "folded")
    load(tmp_path / "folded")


def test_a_text_file_is_all_or_nothing(tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    with room_for(10), pytest.raises(OSError, match="too large"):
        write_text(file, "x" * 11)
    assert list(tmp_path.iterdir()) == []
    write_text(file, "before")
    with room_for(10), pytest.raises(OSError, match="too large"):
        write_text(file, "x" * 11)
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]
