"""Runs of a tiny recipe, spread over processes or not."""

import json
import random
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

LONG = {"train.steps": 50, "train.eval_every": 50, "train.save_every": 25}
TWO_BLOCKS = {"model.num_layers": 2}

FSDP, SPLIT = {"train.sharding": "fsdp"}, {"train.tensor_parallel": 2}
BOTH, STREAM = {**FSDP, **SPLIT}, {**SPLIT, "train.split_stream": True}
MUON, FOLDED = {"train.optimizer": "muon"}, {"train.fold_at_start": True}
PLAIN, COLA = {"low_rank.activation": None}, {"low_rank.activation": "silu"}
NO_RESIDUAL = {"low_rank.residual": None}

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


def write_recipes(folder: Path) -> Path:
    """A recipe of one block and 8 steps; beside it qwen3.yaml, the same with two of another family."""
    text = write_texts(folder / "text", "alpha beta gamma delta = 1")
    settings = {
        "base": "demo",
        "sample_tokens": 2,
        "model": {"hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 4},
        "low_rank": {"rank": 4},
        "data": {"source": str(text), "vocab_size": 270, "validation_fraction": 0.2},
        "train": {"steps": 8, "batch_size": 4, "sequence_length": 16, "eval_every": 8, "save_every": 4},
    }
    settings["train"] |= {"eval_tokens": 100, "optimizer": "adamw", "device": "cpu"}
    settings["train"] |= {"weight_decay": 3.0}  # strong, so that it shows
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings))
    (folder / "qwen3.yaml").write_text(yaml.safe_dump({**settings, "model": {"config": QWEN3}}))
    return file


def write_texts(folder: Path, words: str) -> Path:
    """30 files of 400 words each."""
    folder.mkdir()
    draw = random.Random(0)
    for number in range(30):
        (folder / f"{number}.txt").write_text(" ".join(draw.choices(words.split(), k=400)))
    return folder


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def texts(out: Path) -> list[tuple[int, str]]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["text"]) for row in rows if row.get("event") == "text"]


def metrics(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())


def distance(one: Path, other: Path) -> float:
    """The largest change of a folded weight, over the weights' norm."""
    a, b = (load_file(out / "folded" / "model.safetensors") for out in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / a[name].norm()) for name in a if a[name].is_floating_point())
