"""`foldrank prepare` through the command line."""

import argparse
import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from foldrank.cli import main
from foldrank.commands import prepare as prepare_command
from foldrank.commands.progress import PreparationProgressBar
from foldrank.data import prepare, tokenizer
from foldrank.data.config import SequenceFormat
from foldrank.data.prepared import PreparedData
from tests.data.texts import some_texts, write_folder

TINY = {
    "--model.hidden_size": 16,
    "--model.intermediate_size": 16,
    "--model.num_layers": 1,
    "--low_rank.rank": 4,
    "--train.sequence_length": 16,
    "--train.batch_size": 2,
    "--train.eval_tokens": 64,
    "--steps": 2,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("texts"), some_texts(120))


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def options(values: dict[str, Any]) -> list[object]:
    return [part for pair in values.items() for part in pair]


def result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_prepared_folder_is_what_pretrain_reads(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    assert run("prepare", source, "--out", tmp_path / "data", "--vocab-size", 300, "--json") == 0
    said = result(capsys)
    data = PreparedData(tmp_path / "data")
    assert said["splits"]["train"]["tokens"] == data.tokens("train")
    assert said["splits"]["train"]["documents"] + said["splits"]["validation"]["documents"] == 120
    assert said["bytes"] == sum(file.stat().st_size for file in (tmp_path / "data").rglob("*") if file.is_file())
    settings = options({**TINY, "--data.source": tmp_path / "data", "--train.layout": layout})
    assert run("pretrain", "demo", *settings, "--out", tmp_path / "run", "--json") == 0
    metrics = result(capsys)
    assert metrics["train_tokens_available"] == data.tokens("train")
    order = data.training(SequenceFormat(length=16, layout=layout), seed=0, num_sequences=4)  # pyright: ignore[reportArgumentType]
    assert metrics["tokens"] == order.num_tokens() <= 64
    assert run("evaluate", tmp_path / "run" / "folded", "--json") == 0
    assert result(capsys)["tokens"] >= metrics["val_tokens"]


def test_options_are_settings_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": number, "body": text} for number, text in enumerate(some_texts(60))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = options({"--text-field": "body", "--max-documents": 50, "--validation-fraction": 0.2})
    assert run("prepare", tmp_path / "rows.jsonl", "--out", tmp_path / "data", "--vocab-size", 300, *settings) == 0
    table = capsys.readouterr().out
    config = PreparedData(tmp_path / "data").manifest.config
    assert (config.text_field, config.max_documents, config.validation_fraction) == ("body", 50, 0.2)
    assert "trained on this text, 320 entries" in table
    assert PreparedData(tmp_path / "data").manifest.documents == 50


def test_verify(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("prepare", source, "--out", tmp_path / "data", "--vocab-size", 300)
    assert run("prepare", tmp_path / "data", "--verify") == 0
    assert "every file is as it was prepared" in capsys.readouterr().out
    shard = tmp_path / "data" / "train-00000.bin"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    assert run("prepare", tmp_path / "data", "--verify") == 2
    assert "train-00000.bin not as prepared" in capsys.readouterr().err


def test_progress_says_stages_and_counts(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("prepare", source, "--out", tmp_path / "data", "--vocab-size", 300, "--json")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" in ")[0] for line in lines] == [
        "training the tokenizer ...",
        f"training the tokenizer: {PreparedData(tmp_path / 'data').manifest.splits['train'].documents} documents",
        "tokenizing ...",
        "tokenizing: 120 documents",
    ]


def test_interrupted_says_how_to_go_on(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: PreparationProgressBar, stage: str, documents: int, share: float | None) -> None:  # noqa: ARG001
        if stage == "tokenizing" and documents > 60:
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "COMMIT_CHARACTERS", 2000)
    monkeypatch.setattr(tokenizer, "BATCH_CHARACTERS", 1000)
    command = ("prepare", source, "--out", tmp_path / "data", "--vocab-size", 300)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(PreparationProgressBar, "__call__", stop)
        assert run(*command) == 130
    assert f"kept in {tmp_path / 'data.partial'}: the same command goes on there" in capsys.readouterr().err
    assert run(*command) == 0
    assert "finding the place to go on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{texts}"], "--out is missing"),
        (["{texts}", "--out", "{texts}"], "exists: choose another folder or delete it"),
        (["/no/such/text", "--out", "{out}"], "no such corpus: '/no/such/text'"),
        (["{empty}", "--out", "{out}"], "no text for the train split (0 documents; left out: 1 near-empty)"),
        (["{one}", "--out", "{out}", "--vocab-size", "262"], "no text for the validation split (1 documents"),
        (["{texts}", "--out", "{out}", "--vocab-size", "12"], "vocab_size must be at least 262"),
        (["{texts}", "--out", "{out}", "--vocab-size", "100000"], "this text is too short for a vocabulary"),
        (["{texts}", "--out", "{out}", "--vocab-size", "many"], "data.vocab_size"),
        (["{texts}", "--out", "{out}", "--tokenizer", "/no/such/tokenizer"], "/no/such/tokenizer"),
        (["{texts}", "--out", "{out}", "--max-documents", "0"], "max_documents must be at least 1"),
        (["{texts}", "--verify"], "holds no prepared data"),
        (["{texts}", "--verify", "--vocab-size", "300"], "--verify only reads the folder"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "nothing.txt").touch()
    write_folder(tmp_path / "one", some_texts(1))
    before = sorted(os.listdir(tmp_path))
    names = {"texts": source, "out": tmp_path / "out", "empty": tmp_path / "empty", "one": tmp_path / "one"}
    assert run("prepare", *(argument.format(**names) for argument in arguments)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    line = said.err.splitlines()[-1]
    assert line.startswith("foldrank prepare: ")
    assert message in line
    assert sorted(os.listdir(tmp_path)) == before


def test_prepared_folder_has_its_own_tokenizer(
    source: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("prepare", source, "--out", tmp_path / "data", "--vocab-size", 300)
    settings = options({**TINY, "--data.source": tmp_path / "data", "--data.tokenizer": tokenizer_folder})
    assert run("pretrain", "demo", *settings, "--out", tmp_path / "run") == 2
    assert "was prepared with a tokenizer of its own" in capsys.readouterr().err
    assert run("prepare", tmp_path / "data", "--out", tmp_path / "again") == 2
    assert "holds prepared data, which is tokens, where text is needed" in capsys.readouterr().err


def test_commands_of_the_documentation_are_understood() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("foldrank prepare ")]
    assert len(commands) > 3
    for command in commands:
        parser = argparse.ArgumentParser(exit_on_error=False)
        prepare_command.add_arguments(parser)
        assert parser.parse_args(command[2:]).source
