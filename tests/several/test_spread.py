"""Several processes against one: by DDP, FSDP2, tensor parallelism and both they come to the same weights."""

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from .launch import together
from .spread import work

pytestmark = pytest.mark.apart

STEPS = 50
LONG = {"train.steps": STEPS, "train.eval_every": STEPS, "train.save_every": STEPS // 2, "model.num_layers": 1}
"""A step of two blocks takes twice as long; the shorter runs have two."""

FSDP, SPLIT = {"train.sharding": "fsdp"}, {"train.tensor_parallel": 2}
BOTH, STREAM = {**FSDP, **SPLIT}, {**SPLIT, "train.split_stream": True}
MUON, FOLDED = {"train.optimizer": "muon"}, {"train.fold_at_start": True}
PLAIN, COLA = {"low_rank.activation": None}, {"low_rank.activation": "silu"}
NO_RESIDUAL = {"low_rank.residual": None}

ARMS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "DDP, residual": ({}, {**COLA, **MUON, **LONG}),
    "DDP, folded at the start": ({}, {**PLAIN, **FOLDED, **LONG}),
    "FSDP, residual, AdamW": (FSDP, {**COLA, **LONG}),
    "FSDP, residual, Muon": (FSDP, {**PLAIN, **MUON, **LONG}),
    "FSDP, folded at the start, Muon": (FSDP, {**COLA, **FOLDED, **MUON, **LONG}),
    "FSDP, folded at the start, AdamW": (FSDP, {**PLAIN, **FOLDED, **LONG}),
    "FSDP, no residual, accumulated": (FSDP, {**COLA, **NO_RESIDUAL, "train.micro_batch_size": 1}),
    "split, folded at the start, AdamW": (SPLIT, {**COLA, **FOLDED, **LONG}),
    "split, folded at the start, Muon": (SPLIT, {**PLAIN, **FOLDED, **MUON, **LONG}),
    "split, no residual, by chunks": (SPLIT, {**COLA, **NO_RESIDUAL, "train.chunked_loss": True, **LONG}),
    "split, dense": (SPLIT, {"low_rank": None}),
    "both, folded at the start, AdamW": (BOTH, {**COLA, **FOLDED}),
    "both, folded at the start, Muon": (BOTH, {**PLAIN, **FOLDED, **MUON}),
    "both, no residual, accumulated, by chunks": (
        BOTH,
        {**COLA, **NO_RESIDUAL, "train.chunked_loss": True, "train.micro_batch_size": 1},
    ),
    "both, dense": (BOTH, {"low_rank": None}),
    "split, Qwen3": (SPLIT, {**COLA, **FOLDED}),
    "stream, folded at the start, AdamW": (STREAM, {**COLA, **FOLDED}),
    "stream, folded at the start, Muon, by chunks": (STREAM, {**PLAIN, **FOLDED, **MUON, "train.chunked_loss": True}),
    "stream and shares, Qwen3": ({**STREAM, **FSDP}, {**COLA, **FOLDED}),
    "both, Qwen3, accumulated": (BOTH, {**COLA, **FOLDED, "train.micro_batch_size": 1}),
}
"""How the processes share the work, and what they train."""

QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "head_dim": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}
"""Its norms of queries and keys are whole in each process, which uses them for its own heads alone."""

PROCESSES = {
    arm: 4 if FSDP.items() <= how.items() and SPLIT.items() <= how.items() else 2 for arm, (how, _) in ARMS.items()
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spread")
    (folder / "text").mkdir()
    words = random.Random(0)
    for number in range(30):
        text = " ".join(words.choices(["alpha", "beta", "gamma", "delta", "=", "1"], k=400))
        (folder / "text" / f"{number}.txt").write_text(text)
    settings = {
        "base": "demo",
        "sample_tokens": 2,
        "model": {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 4},
        "low_rank": {"rank": 4},
        "data": {"source": str(folder / "text"), "vocab_size": 270, "validation_fraction": 0.2},
        "train": {"steps": 10, "batch_size": 4, "sequence_length": 16, "eval_every": 10, "save_every": 5},
    }
    settings["train"] |= {"eval_tokens": 100, "optimizer": "adamw", "device": "cpu"}
    settings["train"] |= {"weight_decay": 3.0}  # strong, so that it shows
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings))
    (folder / "qwen3.yaml").write_text(yaml.safe_dump({**settings, "model": {"config": QWEN3}}))
    return file


def run(recipe: Path, settings: Mapping[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    """What `pretrain` is called with; it writes no page, which would take as long as the training."""
    return {"recipe": str(recipe), "settings": settings, "out": out, **more}


def launch(tasks: Mapping[str, Any], folder: Path, *, processes: int, dtype: str = "float32") -> list[Any]:
    """Does the tasks in so many processes, and gives the facts of each."""
    return together(work, folder, tasks, dtype, folder, processes=processes)


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def texts(out: Path) -> list[tuple[int, str]]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["text"]) for row in rows if row.get("event") == "text"]


def distance(one: Path, other: Path) -> float:
    """The largest change of a folded weight, over the weights' norm."""
    a, b = (load_file(out / "folded" / "model.safetensors") for out in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / a[name].norm()) for name in a if a[name].is_floating_point())


@pytest.fixture(scope="module")
def float64(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each arm in one process and in two or four, in float64."""
    folder = tmp_path_factory.mktemp("arms")
    for processes in (1, 2, 4):
        runs = [
            run(
                recipe.with_name("qwen3.yaml") if "Qwen3" in name else recipe,
                {**(how if processes > 1 else {}), **what},
                folder / str(processes) / name,
            )
            for name, (how, what) in ARMS.items()
            if processes in (1, PROCESSES[name])
        ]
        launch({"runs": runs}, folder / str(processes), processes=processes, dtype="float64")
    return folder


@pytest.mark.parametrize("arm", ARMS)
def test_several_processes_come_to_the_weights_of_one(float64: Path, arm: str) -> None:
    one, two = (float64 / str(processes) / arm for processes in (1, PROCESSES[arm]))
    metrics = [json.loads((out / "metrics.json").read_text()) for out in (one, two)]
    assert metrics[1]["val_loss_folded"] == pytest.approx(metrics[0]["val_loss_folded"], rel=1e-9)
    assert distance(one, two) < 1e-9
    steps = ARMS[arm][1].get("train.steps", 10)
    assert len(losses(one)) == steps
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)  # Trainer logs them in float32
    assert texts(two) == texts(one)
    assert [step for step, _ in texts(two)] == [steps]
    assert metrics[1]["start_loss"] == pytest.approx(metrics[0]["start_loss"], rel=1e-9)


@pytest.mark.parametrize(
    ("arm", "processes", "how"),
    [
        ("both, folded at the start, AdamW", 2, SPLIT),
        ("both, folded at the start, Muon", 2, FSDP),
        ("split, folded at the start, AdamW", 4, BOTH),
        ("FSDP, folded at the start, AdamW", 2, STREAM),
    ],
)
def test_a_run_goes_on_spread_in_another_way(
    recipe: Path, float64: Path, tmp_path: Path, arm: str, processes: int, how: dict[str, Any]
) -> None:
    one, before, out = (float64 / "1" / arm, float64 / str(PROCESSES[arm]) / arm, tmp_path / "run")
    shutil.copytree(before, out)
    last = max(out.glob("checkpoints/checkpoint-*"), key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]))
    for later in (last, out / "unfolded", out / "folded"):
        shutil.rmtree(later)
    (out / "metrics.json").unlink()
    again = run(recipe, {**how, **ARMS[arm][1]}, out, resume=True)
    launch({"runs": [again]}, tmp_path / "launch", processes=processes, dtype="float64")
    assert distance(one, out) < 1e-9
    assert losses(out) == pytest.approx(losses(one), rel=1e-6)


@pytest.mark.parametrize(("processes", "how"), [(2, SPLIT), (4, BOTH)])
def test_all_who_split_a_layer_get_the_same_of_a_stream(
    recipe: Path, float64: Path, tmp_path: Path, processes: int, how: dict[str, Any]
) -> None:
    folded = float64 / "1" / "DDP, folded at the start" / "folded"
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for file in folded.glob("tokenizer*"):
        shutil.copy(file, tokenizer)
    settings = {"data.stream": True, "data.tokenizer": str(tokenizer), "data.vocab_size": 512, **FOLDED}
    settings |= {"train.steps": 6, "train.eval_every": 6}
    outs = {number: tmp_path / str(number) for number in (1, processes)}
    for number, out in outs.items():
        begin = run(recipe, {**settings, **(how if number > 1 else {})}, out)
        launch({"runs": [begin]}, tmp_path / f"launch-{number}", processes=number)
    assert losses(outs[processes]) == pytest.approx(losses(outs[1]), rel=1e-5)
    assert distance(*outs.values()) < 1e-5


def test_shards_begin_with_the_weights_of_another_run(recipe: Path, tmp_path: Path) -> None:
    short = {**COLA, "train.steps": 4, "model.tie_embeddings": True}
    launch({"runs": [run(recipe, short, tmp_path / "first")]}, tmp_path / "a", processes=1)
    outs = {processes: tmp_path / f"second-{processes}" for processes in (1, 2)}
    for processes, out in outs.items():
        settings = {**short, **(FSDP if processes > 1 else {}), "low_rank.residual": None, "seed": 1}
        begin = run(recipe, settings, out, init_from=tmp_path / "first")
        launch({"runs": [begin]}, tmp_path / str(processes), processes=processes)
    assert_began_as_one(*outs.values())


def test_parts_and_their_shares_begin_with_the_weights_of_another_run(recipe: Path, tmp_path: Path) -> None:
    short = {**COLA, **FOLDED, "train.steps": 4}
    launch({"runs": [run(recipe, short, tmp_path / "first")]}, tmp_path / "a", processes=1)
    outs = {processes: tmp_path / f"second-{processes}" for processes in (1, 2, 4)}
    hows: dict[int, dict[str, Any]] = {1: {}, 2: SPLIT, 4: BOTH}
    for processes, out in outs.items():
        begin = run(recipe, {**short, **hows[processes], "seed": 1}, out, init_from=tmp_path / "first")
        launch({"runs": [begin]}, tmp_path / str(processes), processes=processes)
    assert_began_as_one(outs[1], outs[2])
    assert_began_as_one(outs[1], outs[4])


def assert_began_as_one(one: Path, several: Path) -> None:
    assert losses(several) == pytest.approx(losses(one), rel=1e-5)
    assert distance(one, several) < 1e-5
    a, b = (json.loads((out / "metrics.json").read_text()) for out in (one, several))
    assert b["val_loss"] == pytest.approx(a["val_loss"], rel=1e-5)
    assert b["lineage"] == a["lineage"]
    assert b["lineage"][0].startswith("began with the weights of the run")


def test_four_processes_in_float32_whose_checkpoint_two_and_one_read(recipe: Path, tmp_path: Path) -> None:
    arms: Sequence[tuple[dict[str, Any], dict[str, Any]]] = [
        (FSDP, {**COLA, **LONG}),
        ({}, {**COLA, **MUON, **LONG}),
        ({"train.tensor_parallel": 4}, {**COLA, **FOLDED, **LONG}),
    ]
    for processes in (1, 4):
        runs = [
            run(recipe, {**(how if processes > 1 else {}), **what}, tmp_path / f"{number}-{processes}")
            for number, (how, what) in enumerate(arms)
        ]
        launch({"runs": runs}, tmp_path / str(processes), processes=processes)
    for number in range(len(arms)):
        one, four = (tmp_path / f"{number}-{processes}" for processes in (1, 4))
        assert losses(four) == pytest.approx(losses(one), rel=1e-5)
        assert distance(one, four) < 1e-5

    checkpoint = tmp_path / "0-4" / "checkpoints" / f"checkpoint-{STEPS}"
    beside = [tmp_path / f"0-{processes}" / "checkpoints" / f"checkpoint-{STEPS}" for processes in (1, 4)]
    for name in ("config.json", "generation_config.json", "modeling_lowrank_llama.py", "tokenizer.json"):
        assert (beside[0] / name).read_text() == (beside[1] / name).read_text()
    read = {}
    for processes in (2, 1):
        folder = tmp_path / f"read-{processes}"
        launch({"read": [str(recipe), LONG, str(checkpoint)]}, folder, processes=processes)
        read[processes] = torch.load(folder / "read.pt")
    weights = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(read[1][name], tensor) for name, tensor in weights.items())
    assert len(read[1]) > 2 * len(weights)  # and the optimizer's state
    assert all(torch.equal(read[2][name], tensor) for name, tensor in read[1].items())


def test_what_processes_hold_and_exchange(recipe: Path, tmp_path: Path) -> None:
    block = {"train.activation_checkpointing": "block"}
    ways: dict[str, dict[str, Any]] = {
        "DDP": COLA,
        "FSDP": {**FSDP, **COLA},
        "FSDP, two passes": {**FSDP, **COLA, "train.micro_batch_size": 1},
        "FSDP, computed again": {**FSDP, **COLA, **block},
        "split": {**SPLIT, **COLA, **FOLDED},
        "split, two passes": {**SPLIT, **COLA, **FOLDED, "train.micro_batch_size": 2},
        "split, computed again": {**SPLIT, **COLA, **FOLDED, **block},
        "split, dense": {**SPLIT, "low_rank": None},
        "stream": {**STREAM, **COLA, **FOLDED},
        "stream, two passes, computed again": {**STREAM, **COLA, **FOLDED, "train.micro_batch_size": 2, **block},
    }
    (one,) = launch({"bytes": str(recipe)}, tmp_path / "one", processes=1)
    wire = {name: (str(recipe), settings) for name, settings in ways.items()}
    for facts in launch({"bytes": str(recipe), "wire": wire}, tmp_path / "two", processes=2):
        assert facts.pop("bytes") <= 0.6 * one["bytes"]
        assert {name: counted for name, (counted, _) in facts.items()} == {
            name: formula for name, (_, formula) in facts.items()
        }
        blocks, tokens, rank, width = 2, 4 * 16, 4, 16
        assert facts["split"][0]["summed"] == 4 * 7 * rank * tokens * blocks
        assert facts["split, dense"][0]["summed"] == 4 * 4 * width * tokens * blocks


def test_what_four_processes_exchange_that_share_and_split(recipe: Path, tmp_path: Path) -> None:
    block = {"train.activation_checkpointing": "block", "train.micro_batch_size": 1}
    ways: dict[str, dict[str, Any]] = {
        "folded": {**BOTH, **COLA, **FOLDED},
        "computed again, two passes": {**BOTH, **COLA, **FOLDED, **block},
        "dense": {**BOTH, "low_rank": None},
        "stream": {**BOTH, **STREAM, **COLA, **FOLDED},
    }
    wire = {name: (str(recipe), settings) for name, settings in ways.items()}
    for facts in launch({"wire": wire}, tmp_path, processes=4):
        for counted, formula in facts.values():
            assert counted == formula
            assert all(counted.values())
