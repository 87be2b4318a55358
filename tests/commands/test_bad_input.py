"""A user's mistake: exit code 2, one line that says what was given and what to do, nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import ViTConfig, ViTModel

from ..called import Foldrank, tree
from ..small_runs import Run

ANYWHERE = [
    ((), "required: COMMAND"),
    (("nonsense",), "invalid choice: 'nonsense'"),
    (("info",), "required: CHECKPOINT"),
    (("info", "x", "--nope"), "unrecognized arguments: --nope"),
    (("fold", "x"), "required: --out"),
    (("generate", "x"), "required: --prompt"),
    (("evaluate", "x", "--batch-size", "many"), "'many' is no whole number"),
    (("pretrain",), "required: RECIPE"),
    (("pretrain", "dmeo"), "no recipe is called 'dmeo'; the nearest are demo"),
    (("pretrain", "nowhere.yaml"), "nowhere.yaml cannot be read as a recipe"),
    (("pretrain", "demo", "--train.stpes", "3"), "unrecognized arguments: --train.stpes"),
    (("pretrain", "demo", "--steps", "0"), "--steps: must be at least 1, got 0"),
    (("pretrain", "demo", "--steps", "few"), "'few' is no whole number"),
    (("pretrain", "demo", "--train.learning_rate", "fast"), "train.learning_rate: .* got 'fast'"),
    (("pretrain", "demo", "--train.betas", "[0.9"), r"--train\.betas: .*\[0\.9"),
    (("pretrain", "demo", "--seed", "-1"), "seed must be at least 0, got -1"),
    (("pretrain", "demo", "--low_rank.rank", "0"), "rank must be at least 1, got 0"),
    (("pretrain", "demo", "--low_rank.rank", "1.5"), "fraction must lie between 0 and 1, got 1.5"),
    (("pretrain", "demo", "--low_rank.rank", "9999"), "rank 9999 is above the full rank 256 of model.layers.0"),
    (("pretrain", "demo", "--low_rank.targets", "[q_prj]"), "'q_prj' matches no linear layer here; the nearest"),
    (("pretrain", "demo", "--low_rank.exclude", "[nothing]"), "exclude: 'nothing' matches no linear layer"),
    (("pretrain", "demo", "--low_rank.residual.scope", "[nothing]"), "residual.scope: 'nothing' matches no"),
    (("pretrain", "demo", "--data.source", "nowhere"), "no such corpus: 'nowhere'"),
    (("pretrain", "demo", "--data.source", "no_text"), "no text .*no_text"),
    (("pretrain", "demo", "--data.source", "short.txt"), "short"),
    (("pretrain", "demo", "--data.tokenizer", "nowhere"), "tokenizer.*nowhere|nowhere.*tokenizer"),
    (("pretrain", "demo", "--data.vocab_size", "3"), "vocab_size must be at least 262, got 3"),
    (("pretrain", "demo", "--train.report_to", "[nothing]"), "report_to.*nothing|nothing.*report_to"),
    (("pretrain", "demo", "--resume", "--out", "nowhere"), "nowhere holds no run"),
    (("pretrain", "demo", "--out", "short.txt"), "short.txt is a file"),
    (("pretrain", "demo", "--out", "short.txt", "--overwrite"), "short.txt is a file"),
    (("pretrain", "demo", "--out", "no_text"), "no_text holds .* no run: choose another folder"),
    (("pretrain", "demo", "--out", "no_text", "--overwrite"), "no_text holds .* no run: choose another folder"),
    (("fold", "nowhere", "--out", "out"), "nowhere is no checkpoint"),
    (("fold", "short.txt", "--out", "out"), "short.txt is no checkpoint"),
    (("info", "nowhere"), r"nowhere is no checkpoint: there is no such folder"),
    (("evaluate", "nowhere"), "nowhere is no checkpoint"),
    (("generate", "nowhere", "--prompt", "x"), "nowhere is no checkpoint"),
    (("generate", "nowhere", "--prompt", ""), "--prompt is empty"),
]
"""Mistakes that need nothing but a folder with an empty corpus and a short file."""


def shown(value: object) -> str:
    return " ".join(value) if isinstance(value, tuple) else ""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a user with an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOLDRANK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "no_text").mkdir()
    (tmp_path / "no_text" / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "brief.txt").write_text("brief " * 20)
    (tmp_path / "cache" / "locks").mkdir(parents=True)
    (tmp_path / "cache" / "data").mkdir()
    return tmp_path


def assert_refused(foldrank: Foldrank, place: Path, arguments: tuple[object, ...], complaint: str) -> None:
    before = tree(place)
    done = foldrank(*arguments)
    assert done.code == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert done.stdout == ""
    assert lines[0].startswith("foldrank")
    with pytest.raises(ValueError, match=complaint):
        raise ValueError(lines[0])
    assert tree(place) == before


@pytest.mark.parametrize(("arguments", "complaint"), ANYWHERE, ids=shown)
def test_a_mistake_anywhere(foldrank: Foldrank, place: Path, arguments: tuple[str, ...], complaint: str) -> None:
    assert_refused(foldrank, place, arguments, complaint)


@pytest.mark.parametrize(("arguments", "complaint"), ANYWHERE[:2] + ANYWHERE[-4:], ids=str)
def test_json_does_not_change_a_refusal(
    foldrank: Foldrank, place: Path, arguments: tuple[str, ...], complaint: str
) -> None:
    assert_refused(foldrank, place, (*arguments, "--json") if arguments else arguments, complaint)


RECIPES = [
    ("trian: {steps: 3}", "no setting 'trian"),
    ("train: {stpes: 3}", "no setting 'train.stpes'; the nearest are train.steps"),
    ("train: {steps: [3]}", "train.steps: .*integer"),
    ("low_rank: {rank: {q_prj: 4}}", "'q_prj' matches no linear layer here; the nearest names are .*q_proj"),
    ("train: {steps: ", "cannot be read as a recipe"),
    ("just text", "cannot be read as a recipe: it holds str"),
    ("base: nothing", "no recipe is called 'nothing'"),
]


@pytest.mark.parametrize(("text", "complaint"), RECIPES)
def test_a_mistake_in_a_recipe_file(foldrank: Foldrank, place: Path, text: str, complaint: str) -> None:
    (place / "mine.yaml").write_text(text)
    assert_refused(foldrank, place, ("pretrain", "mine.yaml"), complaint)


Edit = Callable[[Path], object]


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def altered(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    low_rank = {**config["low_rank"], "residual": None}
    (folder / "config.json").write_text(json.dumps({**config, "low_rank": low_rank}))


READING: dict[str, tuple[object, ...]] = {
    "info": ("info", "checkpoint"),
    "evaluate": ("evaluate", "checkpoint", "--data", "stdlib"),
    "generate": ("generate", "checkpoint", "--prompt", "bar"),
    "fold": ("fold", "checkpoint", "--out", "out"),
}


@pytest.mark.parametrize("command", READING)
@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (truncated, r"model\.safetensors is truncated or damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (lambda folder: (folder / "config.json").unlink(), "is no checkpoint"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not one that foldrank can read"),
        (altered, "not folded but its config has no residual|hold a residual and config.json has none"),
    ],
    ids=["truncated", "no weights", "no config", "damaged config", "altered config"],
)
def test_a_damaged_checkpoint(
    foldrank: Foldrank, finished_run: Run, place: Path, command: str, edit: Edit, complaint: str
) -> None:
    shutil.copytree(finished_run.out / "unfolded", place / "checkpoint")
    edit(place / "checkpoint")
    assert_refused(foldrank, place, READING[command], complaint)


@pytest.mark.parametrize("command", READING)
def test_a_run_in_place_of_its_checkpoint(foldrank: Foldrank, finished_run: Run, place: Path, command: str) -> None:
    shutil.copytree(finished_run.out, place / "checkpoint")
    assert_refused(foldrank, place, READING[command], "did you mean checkpoint/folded or checkpoint/unfolded")


@pytest.mark.parametrize("command", ["evaluate", "generate", "fold"])
def test_a_checkpoint_of_another_kind(foldrank: Foldrank, place: Path, command: str) -> None:
    shape: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ViTModel(ViTConfig(**shape)).save_pretrained(place / "checkpoint")
    complaint = "is dense: there is no residual" if command == "fold" else "holds a vit, which is no language model"
    assert_refused(foldrank, place, READING[command], complaint)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("fold", "folded", "--out", "out"), "folded is folded: there is no residual to fold"),
        (("fold", "unfolded", "--out", "short.txt"), "short.txt exists: choose another folder"),
        (("fold", "unfolded", "--out", "no_text"), "no_text exists: choose another folder"),
        (("fold", "unfolded", "--out", "unfolded"), "unfolded exists"),
        (("generate", "folded", "--prompt", ""), "--prompt is empty: give at least one character"),
        (("generate", "folded", "--prompt", "x", "--max-new-tokens", "0"), "--max-new-tokens: must be at least 1"),
        (("generate", "folded", "--prompt", "x", "--temperature", "-1"), "--temperature"),
        (("generate", "folded", "--prompt", "x", "--temperature", "nan"), "--temperature"),
        (("generate", "folded", "--prompt", "x", "--temperature", "inf"), "--temperature"),
        (("generate", "folded", "--prompt", "x", "--seed", "-1"), "[Ss]eed"),
        (("evaluate", "folded"), r"no run's config\.yaml that foldrank wrote.* name a text with --data"),
        (("evaluate", "folded", "--data", "nowhere"), "no such corpus: 'nowhere'"),
        (("evaluate", "folded", "--data", "no_text"), "no_text holds no text"),
        (("evaluate", "folded", "--data", "short.txt"), "short.txt holds no text"),
        (("evaluate", "folded", "--data", "short.txt", "--batch-size", "0"), "--batch-size: must be at least 1, got 0"),
        (
            ("evaluate", "folded", "--data", "short.txt", "--sequence-length", "0"),
            "--sequence-length: must be at least 2",
        ),
        (
            ("evaluate", "folded", "--data", "short.txt", "--sequence-length", "1"),
            "--sequence-length: must be at least 2",
        ),
        (
            ("evaluate", "folded", "--data", "short.txt", "--sequence-length", "-3"),
            "--sequence-length: must be at least 2",
        ),
    ],
    ids=shown,
)
def test_a_mistake_with_a_good_checkpoint(
    foldrank: Foldrank, finished_run: Run, place: Path, arguments: tuple[str, ...], complaint: str
) -> None:
    for part in ("folded", "unfolded"):
        shutil.copytree(finished_run.out / part, place / part)
    assert_refused(foldrank, place, arguments, complaint)


def test_a_dense_run_has_nothing_to_fold(foldrank: Foldrank, recipe_file: Path, tmp_path: Path) -> None:
    options = ("--low_rank", "null", "--steps", 1, "--train.save_every", 1000)
    assert foldrank("pretrain", recipe_file, "--out", tmp_path / "dense", *options).code == 0
    done = foldrank("fold", tmp_path / "dense" / "unfolded", "--out", tmp_path / "out")
    assert (done.code, done.stderr.count("\n")) == (2, 1)
    assert "is dense: there is no residual to fold" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_corpus_of_a_run_is_gone(foldrank: Foldrank, finished_run: Run, place: Path) -> None:
    shutil.copytree(finished_run.out, place / "run")
    config = yaml.safe_load((place / "run" / "config.yaml").read_text())
    config["data"]["source"] = "gone"
    (place / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    assert foldrank("evaluate", "run/folded").code == 0  # what was prepared of it is still there
    config["run"]["data"]["folder"] = str(place / "gone")
    (place / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    assert_refused(foldrank, place, ("evaluate", "run/folded"), "no such corpus: 'gone'")


def test_a_finished_run_is_named_and_kept(foldrank: Foldrank, finished_run: Run, place: Path) -> None:
    shutil.copytree(finished_run.out, place / "run")
    complaint = r"run holds a finished run \(recipe small, seed 0, 12 steps, validation perplexity .*--overwrite"
    assert_refused(foldrank, place, ("pretrain", finished_run.recipe, "--out", "run"), complaint)
    mistaken = ("pretrain", finished_run.recipe, "--out", "run", "--overwrite", "--low_rank.rank", "99")
    assert_refused(foldrank, place, mistaken, "rank 99 is above the full rank 32")
    (place / "run" / "metrics.json").write_text("{")
    complaint = r"run holds a finished run \(its metrics\.json is damaged"
    assert_refused(foldrank, place, ("pretrain", finished_run.recipe, "--out", "run"), complaint)


def test_debug_shows_the_traceback(foldrank: Foldrank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDRANK_DEBUG", "1")
    with pytest.raises(ValueError, match="is no checkpoint"):
        foldrank("info", "nowhere")
