"""A preparation that is interrupted, killed, disturbed or raced gives the same bytes as one left alone, or an error."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from foldrank.data import corpus, shards, shares, tokenizer
from foldrank.data import prepare as preparation
from foldrank.data.config import DataConfig
from foldrank.data.manifest import Journal
from foldrank.data.prepare import prepare, prepared
from foldrank.data.prepared import PreparedData
from foldrank.data.shares import Share
from foldrank.data.tokenizer import Encoder
from foldrank.hf.tokenizers import load_tokenizer
from tests.data.texts import some_texts, write_folder

COUNT = 200
SIZES = {"COMMIT_CHARACTERS": 3000, "BATCH_CHARACTERS": 1500, "SHARD_TOKENS": 5000}
"""So that 200 small documents make a dozen commits and several shards."""

CHILD = """
import os, signal, sys
from pathlib import Path
from foldrank.data import prepare, shards, tokenizer
from foldrank.data.config import DataConfig
prepare.COMMIT_CHARACTERS, tokenizer.BATCH_CHARACTERS, shards.SHARD_TOKENS = {COMMIT_CHARACTERS}, {BATCH_CHARACTERS}, {SHARD_TOKENS}
source, tokenizer_folder, out, kill_at = sys.argv[1:]

def progress(stage, documents, share):
    if stage == "tokenizing" and documents >= int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)

config = DataConfig(source=source, tokenizer=tokenizer_folder)
if out == "cache":
    print(prepare.prepared(config, progress).folder)
else:
    prepare.prepare(config, Path(out), progress)
""".format(**SIZES)  # noqa: E501


class Stop:
    """Interrupts, as Ctrl-C does, once a stage has come so far."""

    def __init__(self, documents: int, stage: str = "tokenizing") -> None:
        self.stage, self.documents = stage, documents
        self.seen: list[tuple[str, int, float | None]] = []

    def __call__(self, stage: str, documents: int, share: float | None) -> None:
        self.seen.append((stage, documents, share))
        if stage == self.stage and documents >= self.documents:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "COMMIT_CHARACTERS", SIZES["COMMIT_CHARACTERS"])
    monkeypatch.setattr(tokenizer, "BATCH_CHARACTERS", SIZES["BATCH_CHARACTERS"])
    monkeypatch.setattr(shards, "SHARD_TOKENS", SIZES["SHARD_TOKENS"])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("texts"), some_texts(COUNT))


@pytest.fixture
def config(source: Path, tokenizer_folder: Path) -> DataConfig:
    return DataConfig(source=str(source), tokenizer=str(tokenizer_folder))


@pytest.fixture
def undisturbed(config: DataConfig, tmp_path: Path) -> dict[str, bytes]:
    folder = prepare(config, tmp_path / "undisturbed").folder
    assert len(list(folder.glob("train-*.bin"))) > 2
    return content(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing beyond it fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def child(config: DataConfig, out: Path | str, kill_at: int = 10**9) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, config.source, str(config.tokenizer), str(out), str(kill_at)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("stop_at", [[30], [61], [133], [COUNT - 1], [40, 41, 90, 150]])
def test_interrupted_is_equal_to_undisturbed(
    config: DataConfig, undisturbed: dict[str, bytes], tmp_path: Path, stop_at: list[int]
) -> None:
    out = tmp_path / "out"
    for documents in stop_at:
        with pytest.raises(KeyboardInterrupt):
            prepare(config, out, Stop(documents))
        assert not out.exists()
        assert (tmp_path / "out.partial").exists()
    went_on = Stop(10**9)
    assert content(prepare(config, out, went_on).folder) == undisturbed
    assert not (tmp_path / "out.partial").exists()
    assert went_on.seen[0][0] == "finding the place to go on"
    first = next(documents for stage, documents, _ in went_on.seen if stage == "tokenizing")
    assert first > 10  # it did not begin again


@contextmanager
def helped_by(config: DataConfig, out: Path, processes: int) -> Iterator[None]:
    """The other processes of so many, as threads."""
    with ThreadPoolExecutor(processes) as pool:
        helpers = [pool.submit(prepare, config, out, share=Share(each, processes)) for each in range(1, processes)]
        yield
        assert [helper.result().folder for helper in helpers] == [out] * len(helpers)


@pytest.mark.parametrize(("processes", "stop_at"), [(2, []), (3, []), (2, [30, 90]), (3, [61])])
def test_several_processes_make_the_bytes_of_one(
    config: DataConfig,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
    stop_at: list[int],
) -> None:
    monkeypatch.setattr(shares, "BLOCK", 7)
    out = tmp_path / "out"
    with helped_by(config, out, processes):
        for documents in stop_at:
            with pytest.raises(KeyboardInterrupt):
                prepare(config, out, Stop(documents), share=Share(0, processes))
            assert (tmp_path / "out.partial").exists()
        assert content(prepare(config, out, share=Share(0, processes)).folder) == undisturbed


def test_processes_that_read_other_text_are_told(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "BLOCK", 7)
    other = [replace(document, digest=b"0" * 32) for document in corpus.documents(config)]
    out, work = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(KeyboardInterrupt):
        prepare(config, out, Stop(30))
    done = Journal.read(work)
    assert done is not None
    shares.tokenize_share(other, Encoder(load_tokenizer(work / "tokenizer")), Share(1, 2), work, done.documents)
    with pytest.raises(ValueError, match="another process has read other text"):
        prepare(config, out, share=Share(0, 2))


@pytest.mark.parametrize(("process", "processes"), [(2, 2), (-1, 2), (0, 0)])
def test_a_share_is_one_of_those_there_are(process: int, processes: int) -> None:
    with pytest.raises(ValueError, match="which count from 0"):
        Share(process, processes)


def test_interrupted_during_a_commit(
    config: DataConfig, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Journal.write, []

    def save(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Journal, "write", save)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tmp_path / "out")
    assert content(prepare(config, tmp_path / "out").folder) == undisturbed


@pytest.mark.parametrize("stage", ["training the tokenizer", "tokenizing"])
def test_interrupted_with_a_tokenizer_of_its_own(source: Path, tmp_path: Path, stage: str) -> None:
    config = DataConfig(source=str(source), vocab_size=300)
    undisturbed = content(prepare(config, tmp_path / "undisturbed").folder)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tmp_path / "out", Stop(100, stage))
    assert content(prepare(config, tmp_path / "out").folder) == undisturbed


def test_killed_is_equal_to_undisturbed(config: DataConfig, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    process = child(config, tmp_path / "out", kill_at=140)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "out.partial" / "journal.json").read_text())["documents"] > 0
    assert content(prepare(config, tmp_path / "out").folder) == undisturbed


@pytest.mark.apart
def test_two_processes_prepare_the_same(config: DataConfig, undisturbed: dict[str, bytes], own_cache: Path) -> None:
    racers = [child(config, "cache") for _ in range(2)]
    said = [(*racer.communicate(), racer.returncode) for racer in racers]
    assert [code for *_, code in said] == [0, 0], said
    assert said[0][0] == said[1][0]
    folder = prepared(config).folder
    assert said[0][0] == f"{folder}\n"
    assert content(folder) == undisturbed
    assert os.listdir(own_cache / "data") == [folder.name]


def test_nothing_is_left_before_the_first_commit(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tmp_path / "out", Stop(1))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("altered", ["0002.txt", "0199.txt"])
def test_text_that_changed_meanwhile(
    tmp_path: Path, tokenizer_folder: Path, altered: str, undisturbed: dict[str, bytes]
) -> None:
    source = write_folder(tmp_path / "texts", some_texts(COUNT))
    config = DataConfig(source=str(source), tokenizer=str(tokenizer_folder))
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tmp_path / "out", Stop(100))
    (source / altered).write_text("another text, which was not there before")
    if altered == "0199.txt":  # not read yet
        assert content(prepare(config, tmp_path / "out").folder).keys() == undisturbed.keys()
    else:
        with pytest.raises(ValueError, match=r"the text has changed since .*out\.partial was begun"):
            prepare(config, tmp_path / "out")


def test_begun_with_other_settings(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tmp_path / "out", Stop(100))
    other = DataConfig(source=config.source, tokenizer=config.tokenizer, validation_fraction=0.3)
    with pytest.raises(ValueError, match=r"out\.partial holds a preparation begun with other settings"):
        prepare(other, tmp_path / "out")
    prepare(config, tmp_path / "out")


@pytest.mark.parametrize("damage", ["altered", "truncated", "removed"])
def test_damaged_partial_folder(config: DataConfig, tmp_path: Path, damage: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tmp_path / "out", Stop(100))
    shard = sorted((tmp_path / "out.partial").glob("train-*.bin"))[-1]
    data = shard.read_bytes()
    if damage == "removed":
        shard.unlink()
    else:
        shard.write_bytes(data[:10] if damage == "truncated" else b"\1" + data[1:])
    with pytest.raises((ValueError, OSError), match=shard.name):
        prepare(config, tmp_path / "out")


@pytest.mark.parametrize("place", ["shard", "tokenizer"])
def test_disk_that_is_full(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 1 << 20)
    undisturbed = content(prepare(config, tmp_path / "undisturbed").folder)
    largest = {name: len(data) for name, data in undisturbed.items()}
    limit = largest["train-00000.bin"] - 1000 if place == "shard" else largest["tokenizer/tokenizer.json"] - 1000
    assert largest["tokenizer/tokenizer.json"] < largest["train-00000.bin"] - 1000
    with file_size_limit(limit), pytest.raises(OSError, match="large") as stopped:
        prepare(config, tmp_path / "out")
    assert (f"What is done is kept in {tmp_path / 'out.partial'}" in str(stopped.value)) == (place == "shard")
    assert (tmp_path / "out.partial").exists() == (place == "shard")
    assert content(prepare(config, tmp_path / "out").folder) == undisturbed


@pytest.mark.parametrize(
    "name", ["train-00001.bin", "train-00001.ends", "validation-00000.bin", "tokenizer/tokenizer.json"]
)
def test_verify_finds_what_was_altered(config: DataConfig, tmp_path: Path, name: str) -> None:
    data = prepare(config, tmp_path / "out")
    data.verify()
    file = data.folder / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{name} not as prepared"):
        PreparedData(data.folder).verify()
    file.unlink()
    with pytest.raises(ValueError, match=f"{name} not as prepared"):
        data.verify()


def test_cache_is_used_again_and_made_again_for_another_tokenizer(
    source: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "tokenizer"
    copy.mkdir()
    for file in tokenizer_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = DataConfig(source=str(source), tokenizer=str(copy))
    seen = Stop(10**9)
    first = prepared(config, seen).folder
    said = len(seen.seen)
    assert prepared(config, seen).folder == first
    assert len(seen.seen) == said
    settings = json.loads((copy / "tokenizer.json").read_text())
    settings["model"]["merges"].pop()
    (copy / "tokenizer.json").write_text(json.dumps(settings))
    assert prepared(config).folder != first
