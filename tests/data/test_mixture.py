"""Mixtures: shares by weight at every moment, one order whoever reads it, a run that goes on, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from foldrank.data import order
from foldrank.data.config import DataConfig, SequenceFormat
from foldrank.data.mixture import MixedData
from foldrank.data.order import MixedDataset
from foldrank.data.prepare import prepare
from foldrank.data.sequences import IGNORED, PackedBlocks
from foldrank.recipes import load_recipe
from foldrank.recipes.schema import Recipe
from foldrank.train.pretrain import pretrain
from tests.data.texts import some_texts, write_folder

from ..called import Foldrank

WEIGHTS = {"one": 0.55, "two": 3.0, "three": 0.013}
SMALL: dict[str, Any] = {
    "model.hidden_size": 16,
    "model.intermediate_size": 24,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "low_rank.rank": 3,
    "data.sources": None,
    "sample_prompt": "ba",
    "sample_tokens": 4,
    "train.steps": 6,
    "train.batch_size": 4,
    "train.sequence_length": 16,
    "train.eval_every": 3,
    "train.save_every": 3,
    "train.eval_tokens": 300,
    "train.test_tokens": 100,
}


def numbered(source: int, count: int) -> PackedBlocks:
    """Sequences that begin with the number of their source, and go on with their own."""
    return PackedBlocks([np.array([[source, number] for number in range(count)], dtype="<u2").ravel()], 2)


def mixed(num_sequences: int, seed: int = 3) -> MixedDataset:
    parts = {name: numbered(number, 5 + 50 * number) for number, name in enumerate(WEIGHTS)}
    return MixedDataset(parts, WEIGHTS, seed, num_sequences)


def read(dataset: Any, indices: Any) -> list[tuple[int, ...]]:
    return [tuple(dataset[index]["input_ids"].tolist()) for index in indices]


@pytest.mark.parametrize("window", [8, 1 << 16])
def test_shares_are_right_at_every_moment(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "WINDOW", window)
    count = 5000
    drawn = read(mixed(count), range(count))
    shares = np.array(list(WEIGHTS.values())) / sum(WEIGHTS.values())
    seen = np.cumsum([[source == number for number in range(3)] for source, _ in drawn], axis=0)
    exact = np.arange(1, count + 1)[:, None] * shares
    assert np.abs(seen - exact).max() <= 1.5  # of a run of 5,000 less than 0.1 %
    for number in range(3):
        # Each source comes in whole passes, no sequence twice in one of them.
        own = [sequence for source, sequence in drawn if source == number]
        size = 5 + 50 * number
        for at in range(0, len(own) - size + 1, size):
            assert sorted(own[at : at + size]) == list(range(size))
    for at in (0, 1, 77, count):
        assert mixed(count).tokens_by_source(at) == {
            name: 2 * sum(source == number for source, _ in drawn[:at]) for number, name in enumerate(WEIGHTS)
        }


def test_the_order_does_not_depend_on_who_reads_it_or_how_far() -> None:
    drawn = read(mixed(300), range(300))
    assert read(mixed(900), range(300)) == drawn
    assert read(mixed(300), reversed(range(300))) == drawn[::-1]
    assert read(mixed(300, seed=4), range(300)) != drawn
    batches = DataLoader(mixed(300), batch_size=10, num_workers=2)
    assert [tuple(row) for batch in batches for row in batch["input_ids"].tolist()] == drawn
    for processes in (1, 2, 3):
        sampler = BatchSampler(SequentialSampler(range(300)), 12 // processes, drop_last=False)
        shards = [
            [index for batch in BatchSamplerShard(sampler, processes, rank) for index in batch or ()]
            for rank in range(processes)
        ]
        read_by_all = {index: one for mine in shards for index, one in zip(mine, read(mixed(300), mine), strict=True)}
        assert [read_by_all[index] for index in range(300)] == drawn


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> dict[str, Path]:
    folder, prepared = tmp_path_factory.mktemp("sources"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLDRANK_CACHE", str(folder / "cache"))
        for seed, name in enumerate(("code", "prose")):
            texts = write_folder(folder / f"{name}-text", some_texts(60, seed=seed))
            config = DataConfig(source=str(texts), tokenizer=str(tokenizer_folder), validation_fraction=0.3)
            prepared[name] = prepare(config, folder / name).folder
    return prepared


def recipe_of(folders: dict[str, Path], **settings: Any) -> Recipe:
    sources = [{"source": str(folders["code"]), "weight": 1}, {"source": str(folders["prose"]), "weight": 3}]
    return load_recipe("demo", {**SMALL, "data.sources": sources, **settings})


@pytest.mark.parametrize("layout", ["packed", "best-fit", "padded"])
def test_a_mixture_reads_what_its_folders_hold(folders: dict[str, Path], layout: Any) -> None:
    recipe = recipe_of(folders)
    data, form = MixedData(recipe.data), SequenceFormat(length=16, layout=layout)
    training = data.training(form, seed=0, num_sequences=400)
    tokens = [int((training[index]["labels"] != IGNORED).sum()) for index in range(400)]
    assert training.num_tokens() == sum(tokens) == sum(training.tokens_by_source(400).values())
    validation = data.validation(form, 400)
    for name, at in validation.ranges().items():
        own = data.data[name].validation(form, {"code": 100, "prose": 300}[name])
        assert len(at) == len(own)  # pyright: ignore[reportArgumentType]
        assert all(torch.equal(validation[i]["input_ids"], own[n]["input_ids"]) for n, i in enumerate(at))


def test_a_run_tells_of_each_source_and_goes_on_to_the_last_bit(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of(folders)
    whole = pretrain(recipe, tmp_path / "whole", quiet=True)
    assert whole.tokens_by_source == {"code": 6 * 16, "prose": 18 * 16}
    assert whole.tokens == sum(whole.tokens_by_source.values())
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [entry["tokens/prose"] for entry in log if "loss" in entry] == [48 * step for step in range(1, 7)]
    at_end = [entry for entry in log if "eval_loss" in entry][-1]
    losses = [at_end["eval_loss/code"], at_end["eval_loss/prose"]]
    assert min(losses) < at_end["eval_loss"] < max(losses)
    assert whole.val_loss_by_source == pytest.approx({"code": losses[0], "prose": losses[1]}, rel=1e-5)

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-6")
    (tmp_path / "cut" / "metrics.json").unlink()
    again = pretrain(recipe, tmp_path / "cut", resume=True, quiet=True)
    assert (again.resumed_at_step, again.val_loss, again.sample) == (3, whole.val_loss, whole.sample)
    log_again = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in log_again if "loss" in line] == [line["loss"] for line in log if "loss" in line]


def test_the_command_line_names_each_source(folders: dict[str, Path], foldrank: Foldrank, tmp_path: Path) -> None:
    sources = f"[{{source: {folders['code']}, weight: 1}}, {{source: {folders['prose']}, weight: 3, name: books}}]"
    options = [part for name, value in SMALL.items() if name != "data.sources" for part in (f"--{name}", str(value))]
    trained = foldrank("pretrain", "demo", "--out", tmp_path / "run", *options, "--data.sources", sources)
    assert trained.code == 0, trained.stderr
    assert "tokens of books" in trained.stdout
    assert "75.00%" in trained.stdout
    evaluated = foldrank("evaluate", tmp_path / "run" / "folded", "--json")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert evaluated.json["loss_by_source"] == pytest.approx(metrics["val_loss_by_source"], rel=1e-6)
    # A source that is another one now.
    moved = tmp_path / "moved"
    shutil.copytree(folders["code"], moved)
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(text.replace(f"source: {folders['prose']}", f"source: {moved}"))
    refused = foldrank("evaluate", tmp_path / "run" / "folded")
    assert refused.code == 2
    assert "the text of the source books has changed" in refused.stderr


def test_a_study_of_a_mixture_goes_on(folders: dict[str, Path], foldrank: Foldrank, tmp_path: Path) -> None:
    settings = {name: value for name, value in SMALL.items() if name not in ("data.sources", "low_rank.rank")}
    sources = [{"source": str(folder), "weight": 1} for folder in folders.values()]
    study = {"title": "mixed", "settings": settings, "corpora": {"both": {"data.sources": sources}}}
    study |= {"sizes": {"micro": {"rank": 3}}, "seeds": [0], "methods": ["cola"]}
    study["sweep"] = {"learning_rates": [0.01], "extend": 0}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    for _ in range(2):
        done = foldrank("compare", tmp_path / "study.yaml", "--out", tmp_path / "out", "--json")
        assert (done.json["failed"], done.json["missing"]) == ({}, 0)


def other_tokenizer(folders: dict[str, Path], folder: Path) -> list[dict[str, Any]]:
    texts = write_folder(folder / "text", some_texts(60, seed=9))
    prepare(DataConfig(source=str(texts), vocab_size=320, validation_fraction=0.3), folder / "other")
    return [{"source": str(folders["code"]), "weight": 1}, {"source": str(folder / "other"), "weight": 1}]


def plain_text(folders: dict[str, Path], folder: Path) -> list[dict[str, Any]]:
    text = write_folder(folder / "text", ["x" * 99])
    return [{"source": str(folders["code"]), "weight": 1}, {"source": str(text), "weight": 1}]


def cut_short(folders: dict[str, Path], folder: Path) -> list[dict[str, Any]]:
    shutil.copytree(folders["code"], folder / "cut")
    (folder / "cut" / "train-00000.bin").write_bytes(b"12")
    return [{"source": str(folder / "cut"), "weight": 1}]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (other_tokenizer, "have other tokenizers .sha256"),
        (plain_text, "is no prepared data, of which alone mixtures are made"),
        (cut_short, "train-00000.bin is truncated or missing"),
    ],
)
def test_what_cannot_be_mixed_is_one_line(
    make: Callable[..., Any], says: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        pretrain(recipe_of(folders, **{"data.sources": make(folders, tmp_path)}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        ([], "sources is empty"),
        ([{"source": "a"}], "weight"),
        ([{"source": "a", "weight": 0}], "weight must be a number above 0"),
        ([{"source": "a", "weight": float("nan")}], "weight"),
        ([{"source": "a", "weight": True}], "should be a number"),
        ([{"source": "x/a", "weight": 1}, {"source": "y/a", "weight": 1}], "2 sources are called 'a'"),
        ([{"source": "a", "weight": 1, "share": 2}], "share"),
        ("a", "data.sources"),
    ],
    ids=str,
)
def test_settings_of_a_mixture_are_checked(sources: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_recipe("demo", {"data.sources": sources})


@pytest.mark.parametrize("settings", [{"data.stream": True}, {"data.token_format": "uint16", "data.end_token": 0}])
def test_what_says_nothing_of_prepared_folders_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="sources are prepared data"):
        load_recipe("demo", {"data.sources": [{"source": "a", "weight": 1}], "data.tokenizer": None, **settings})
