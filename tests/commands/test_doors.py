"""What people type, and what their terminals and files do to it (the doors for settings, numbers and output)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from foldrank.commands.arguments import whole_number
from foldrank.recipes.reading import load_recipe
from foldrank.structured import parse_yaml, read_yaml, to_json, to_yaml

from ..called import Done, Foldrank


def refused(done: Done, complaint: str) -> None:
    assert complaint in done.stderr
    assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert len(done.stderr) <= 301


def config(foldrank: Foldrank, *options: object) -> dict[str, dict[str, object]]:
    return foldrank("pretrain", "demo", "--print_config", *options, "--json").json["config"]


def test_text_is_taken_as_it_is_typed(foldrank: Foldrank) -> None:
    data = config(foldrank, "--data.subset", "no", "--data.split", "2023_11", "--data.text_field", "a: b")["data"]
    assert (data["subset"], data["split"], data["text_field"]) == ("no", "2023_11", "a: b")
    for prompt in ("The ", "Once: the", "null", "[/x]", "- 1", "ü\u202e"):
        assert config(foldrank, "--sample_prompt", prompt)["sample_prompt"] == prompt
    assert config(foldrank, "--data.subset", "null")["data"]["subset"] is None


@pytest.mark.parametrize("typed", ["010", "10", "+10"])
def test_numbers_are_decimal(foldrank: Foldrank, typed: str) -> None:
    assert config(foldrank, "--train.batch_size", typed)["train"]["batch_size"] == 10


def test_a_whole_number_with_many_zeros_before_it_is_that_number() -> None:
    assert whole_number(1, 100)("0" * 40 + "7") == 7


@pytest.mark.parametrize("typed", ["1:30", "0x10", "1_000", "ten", "1e400", "9" * 26, "-1", "0", "true"])
def test_what_is_no_number_is_refused(foldrank: Foldrank, typed: str) -> None:
    refused(foldrank("pretrain", "demo", "--print_config", "--train.batch_size", typed), "batch_size")


@pytest.mark.parametrize(
    "text", [*("no", "yes", "on", "010", "1:30", "1e-3", "null"), *("~", "", " a", "2023_11", "ü", "a: b", "0x1")]
)
def test_settings_survive_being_saved(text: str) -> None:
    assert parse_yaml(to_yaml({"a": text})) == {"a": text}
    assert yaml.safe_load(to_yaml({"a": text})) == {"a": text}


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("train: {steps: 1}\ntrain: {steps: 2}\n", "the key 'train' occurs twice in line 2, column 1"),
        (BOMB, "more than 20,000 values"),
        ("low_rank: {extra_config: &a {x: *a}}\n", "the alias *a stands for itself"),
        ("[" * 1000, "nested deeper than 40 levels"),
        ("{a: " * 1000, "nested deeper than 40 levels"),
        ("x: y\n" * 300_000, "bytes, and at most"),
        ("base: [demo]\n", "base must be the name"),
        ("base: 3\n", "base must be the name"),
        ("base: {a: b}\n", "base must be the name"),
        ("base: demo\nsample_prompt: &p [*p]\n", "stands for itself"),
        ("!!python/object/apply:os.system [touch marker]\n", "cannot be read as"),
        ("? [1, 2]\n: x\n", "cannot be a key"),
        ('sample_prompt: "\\ud800"\n', " character"),
        ("base: demo\nlow_rank: {targets: ['(([a-z_.0-9]+)+)+Z']}\n", "takes too long"),
    ],
)
def test_a_recipe_file_that_would_never_end_is_one_line(
    foldrank: Foldrank, tmp_path: Path, content: str, complaint: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    refused(foldrank("plan", tmp_path / "recipe.yaml"), complaint)


def test_a_recipe_is_a_regular_file(foldrank: Foldrank, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    refused(foldrank("plan", tmp_path / "pipe.yaml"), "it is no regular file")
    (tmp_path / "upper.YAML").write_text("base: demo\nseed: 3\n")
    assert load_recipe(str(tmp_path / "upper.YAML")).seed == 3


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(
            ("model.hidden_size", 2_000_000_000),
            ("model.num_layers", 2_000_000_000),
            ("model.vocab_size", 2_000_000_000),
        ),
        *(("data.vocab_size", 2_000_000_000), ("train.batch_size", 2_000_000_000), ("train.batch_size", 1_000_000)),
        *(("train.loader_workers", 2_000_000_000), ("train.loader_workers", -1), ("low_rank.scale", 1e30)),
        *(("low_rank.scale", 1e308), ("low_rank.residual.alpha", 1e30), ("train.learning_rate", 1e30)),
        *(("train.weight_decay", 1e308), ("train.steps", 10**26), ("train.sequence_length", 10**7)),
    ],
)
def test_absurd_numbers_are_refused_before_any_work(
    foldrank: Foldrank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, value: float
) -> None:
    monkeypatch.chdir(tmp_path)
    done = foldrank("pretrain", "demo", f"--{setting}", value)
    assert done.code == 2
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_model_larger_than_the_memory_is_refused_with_the_plan(foldrank: Foldrank, tmp_path: Path) -> None:
    sizes = ("--model.hidden_size", 65_536, "--model.num_layers", 100)
    refused(foldrank("pretrain", "demo", *sizes, "--out", tmp_path / "run"), "GiB for weights, gradients and optimizer")
    assert not (tmp_path / "run").exists()


def test_settings_that_fit_no_data_leave_nothing(foldrank: Foldrank, recipe_file: Path, tmp_path: Path) -> None:
    for options in (("--train.sequence_length", 50_000), ("--model.vocab_size", 300)):
        done = foldrank("pretrain", recipe_file, "--out", tmp_path / "run", *options)
        assert done.code == 2
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["[bold]", "[/x]", ":smile:", "x" * 5000, "a\x1b[31mb", "a\nb"])
def test_names_from_outside_are_no_markup_and_bounded(foldrank: Foldrank, name: str) -> None:
    done = foldrank("info", name)
    refused(done, "is no checkpoint" if len(name) < 1000 else "x" * 100)
    if name.startswith("["):
        assert name in done.stderr
    assert "\x1b" not in done.stderr


def test_paths_with_brackets_are_shown_whole(foldrank: Foldrank, recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "[bold]" / "[x]"
    done = foldrank("pretrain", recipe_file, "--out", out, "--steps", 1, "--train.eval_tokens", 64)
    assert done.code == 0
    assert (out / "folded" / "model.safetensors").exists()
    assert "[bold]/[x]" in done.stdout.replace("\n", "").replace("│", "").replace(" ", "")


def test_bytes_that_are_no_text_are_refused(foldrank: Foldrank, tmp_path: Path) -> None:
    for command in (("generate", "x", "--prompt", "a\udcff"), ("fold", "x", "--out", "\udcff"), ("info", "\ud800")):
        refused(foldrank(*command), "is no text in UTF-8")
    refused(foldrank("prepare", "--out", tmp_path / "data", "x\udce9"), "is no text in UTF-8")


def test_a_locale_without_utf_8(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("base: demo\nsample_prompt: größer → ü\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "POSIX"}
    command = [
        sys.executable,
        "-m",
        "foldrank",
        "pretrain",
        "recipe.yaml",
        "--print_config",
        "--data.subset",
        "fränzösisch",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = read_yaml(_written(tmp_path / "printed.yaml", done.stdout))
    assert (printed["sample_prompt"], printed["data"]["subset"]) == ("größer → ü", "fränzösisch")


def _written(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def test_json_is_json() -> None:
    found = json.loads(to_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": "x"}))
    assert found == {"a": None, "b": [None, 1.5], "c": "x"}


def test_a_link_that_points_at_itself(foldrank: Foldrank, corpus: Path, tmp_path: Path, recipe_file: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for command in (
        ("prepare", corpus, "--out", tmp_path / "loop"),
        ("pretrain", recipe_file, "--out", tmp_path / "loop"),
        ("info", tmp_path / "loop"),
        ("prepare", tmp_path / "loop", "--out", tmp_path / "data"),
    ):
        done = foldrank(*command)
        assert done.code == 2
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("cache", ["file", "loop", "/proc/none"])
def test_a_cache_that_cannot_be_written_is_named(
    foldrank: Foldrank, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setenv("FOLDRANK_CACHE", str(tmp_path / cache))
    done = foldrank("pretrain", recipe_file, "--out", tmp_path / "run")
    assert done.code == 2
    assert "FOLDRANK_CACHE" in done.stderr.splitlines()[-1]


def test_doctor(foldrank: Foldrank) -> None:
    found = foldrank("doctor", "--json").json
    assert found["versions"]["torch"]
    assert found["memory_bytes"] > 1 << 30
    assert found["folders"]["cache"]["path"] == os.environ["FOLDRANK_CACHE"]
    lines = foldrank("doctor").stdout.splitlines()
    assert len(lines) >= 12
    assert all(": " in line or "=" in line for line in lines)


def test_evaluate_on_records_with_another_field(foldrank: Foldrank, tmp_path: Path, finished_run: object) -> None:
    folded = getattr(finished_run, "out") / "folded"  # noqa: B009
    rows = [json.dumps({"body": "bar ken losh mide nust " * 9, "n": number}) for number in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    refused(foldrank("evaluate", folded, "--data", tmp_path / "rows.jsonl"), "name the one with the text (text_field)")
    found = foldrank("evaluate", folded, "--data", tmp_path / "rows.jsonl", "--text-field", "body", "--json").json
    assert found["tokens"] > 5
    refused(foldrank("evaluate", folded, "--split", "test"), "--split says something of --data")


def test_plan_says_what_filling_up_a_vocabulary_would_cost(foldrank: Foldrank) -> None:
    notes = foldrank("plan", "demo", "--model.vocab_size", 4100, "--json").json["notes"]
    assert "with --model.vocab_size 4160" in notes[0]
    assert f"{2 * 60 * 256:,} more parameters" in notes[0]
    assert foldrank("plan", "demo", "--json").json["notes"] == []
