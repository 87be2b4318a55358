"""Folding a checkpoint on disk, and saying what one is without loading it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from foldrank import LowRankConfig, ResidualConfig, fold_
from foldrank.core.inventory import count_parameters
from foldrank.hf import convert_
from foldrank.hf.checkpoint import INDEX, fold_checkpoint, inspect, weight_files
from foldrank.surgery.memory_format import to_column_major_

from .models import COLA_DLR, SHAPE, logits, trained

RESIDUALS = {
    "contiguous": ResidualConfig(),
    "balanced": ResidualConfig(alpha=0.6, expansion="balanced"),
    "random": ResidualConfig(expansion="random", seed=5),
    "alternating": ResidualConfig(alpha=0.8, signs="alternating"),
    "random signs": ResidualConfig(expansion="random", signs="random", seed=5),
    "trainable": ResidualConfig(alpha=0.7, trainable=True),
    "both": ResidualConfig(alpha=0.7, trainable=True, expansion="random", variance_correction=False),
    "attention": ResidualConfig(scope="attention"),
}
ALL_IN_ONE, SHARDED = 10**9, 1200
"""Largest file of a checkpoint in bytes: above, and well below, the size of the model."""


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def assert_folds_as_the_model(model: PreTrainedModel, tmp_path: Path, max_shard_size: int = ALL_IN_ONE) -> int:
    """`fold_checkpoint` writes what `fold_` and `save_pretrained` would have."""
    model.save_pretrained(tmp_path / "unfolded", max_shard_size=max_shard_size)
    before = {path.name: path.read_bytes() for path in (tmp_path / "unfolded").iterdir()}
    layers = fold_checkpoint(tmp_path / "unfolded", tmp_path / "folded")
    assert {path.name: path.read_bytes() for path in (tmp_path / "unfolded").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"unfolded", "folded"}
    report = fold_(model)
    model.save_pretrained(tmp_path / "expected", max_shard_size=max_shard_size)
    written, expected = tensors_of(tmp_path / "folded"), tensors_of(tmp_path / "expected")
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])
    for name in ("config.json", "generation_config.json", "modeling_lowrank_llama.py"):
        assert (tmp_path / "folded" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "folded")), logits(model))
    assert layers == len(report.errors)
    return layers


@pytest.mark.parametrize("max_shard_size", [ALL_IN_ONE, SHARDED], ids=["one file", "sharded"])
@pytest.mark.parametrize("residual", RESIDUALS.values(), ids=RESIDUALS)
def test_a_checkpoint_folds_as_the_model_does(residual: ResidualConfig, max_shard_size: int, tmp_path: Path) -> None:
    model = trained(LowRankConfig(rank=3, activation="silu", residual=residual))
    layers = assert_folds_as_the_model(model, tmp_path, max_shard_size)
    assert layers == (8 if residual.scope == "attention" else 14)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_bf16_is_summed_in_float32_and_rounded_once(tied: bool, tmp_path: Path) -> None:
    assert_folds_as_the_model(trained(dtype=torch.bfloat16, tie_word_embeddings=tied), tmp_path)


def test_the_residual_may_lie_in_another_file_than_its_weight(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "unfolded", max_shard_size=SHARDED)
    index = json.loads((tmp_path / "unfolded" / INDEX).read_text())
    apart = [
        name
        for name, file in index["weight_map"].items()
        if name.endswith("up.weight") and index["weight_map"].get(name[: -len("up.weight")] + "residual.spec") != file
    ]
    assert apart, "the sharding of this test no longer separates any"
    assert len(set(index["weight_map"].values())) > 3
    fold_checkpoint(tmp_path / "unfolded", tmp_path / "folded")
    written = json.loads((tmp_path / "folded" / INDEX).read_text())
    tensors = tensors_of(tmp_path / "folded")
    assert written["weight_map"].keys() == tensors.keys()
    assert written["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("max_shard_size", [ALL_IN_ONE, SHARDED], ids=["one file", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", ["unfolded", "folded"])
def test_inspect(state: str, dtype: torch.dtype, max_shard_size: int, tmp_path: Path) -> None:
    model = trained(LowRankConfig(rank=3, residual=RESIDUALS["both"]), dtype=dtype, tie_word_embeddings=True)
    if state == "folded":
        fold_(model)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    info = inspect(tmp_path)
    assert (info.path, info.model_type, info.state) == (str(tmp_path), "lowrank_llama", state)
    assert info.params == count_parameters(model)
    assert info.bytes == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    short = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    assert info.dtypes == {short: len(dict(model.named_parameters()))}
    assert info.shape == {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    assert info.low_rank is not None
    assert list(info.low_rank["rank"].values()) == [3] * 14
    assert (info.low_rank["residual"] is None) is (state == "folded")


@pytest.mark.parametrize("kind", ["llama", "low-rank class"])
def test_inspect_knows_dense_models(kind: str, tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)) if kind == "llama" else trained(None)
    model.save_pretrained(tmp_path)
    info = inspect(tmp_path)
    assert (info.state, info.low_rank, info.params) == ("dense", None, count_parameters(model))


@pytest.mark.parametrize("state", ["folded", "dense", "never with a residual"])
def test_nothing_to_fold(state: str, tmp_path: Path) -> None:
    low_rank = {"folded": COLA_DLR, "dense": None, "never with a residual": LowRankConfig(rank=3)}[state]
    model = trained(low_rank)
    fold_(model)
    model.save_pretrained(tmp_path / "checkpoint")
    shown = "dense" if state == "dense" else "folded"
    with pytest.raises(ValueError, match=f"checkpoint is {shown}: there is no residual to fold"):
        fold_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("what", ["file", "folder", "empty folder"])
def test_fold_does_not_overwrite(what: str, tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path / "unfolded")
    out = tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    else:
        out.mkdir()
    if what == "folder":
        (out / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out exists: choose another folder"):
        fold_checkpoint(tmp_path / "unfolded", out)
    assert {path.name for path in tmp_path.iterdir()} == {"unfolded", "out"}
    if what == "folder":
        assert (out / "mine").read_text() == "mine"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_leave_nothing_behind(bad: float, tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path / "unfolded")
    file = tmp_path / "unfolded" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.up.weight"][3, 1] = bad
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.up\.weight: weight holds NaN or infinity"):
        fold_checkpoint(tmp_path / "unfolded", tmp_path / "folded")
    assert [path.name for path in tmp_path.iterdir()] == ["unfolded"]


def test_a_residual_without_its_weight_is_refused(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path / "unfolded")
    file = tmp_path / "unfolded" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.up.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no model\.layers\.1\.mlp\.up_proj\.up\.weight: it is not whole"):
        fold_checkpoint(tmp_path / "unfolded", tmp_path / "folded")
    assert [path.name for path in tmp_path.iterdir()] == ["unfolded"]


def test_other_files_of_the_checkpoint_come_along(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path / "unfolded")
    (tmp_path / "unfolded" / "tokenizer.json").write_text("{}")
    (tmp_path / "unfolded" / "deep").mkdir()
    fold_checkpoint(tmp_path / "unfolded", tmp_path / "new" / "folded")
    assert (tmp_path / "new" / "folded" / "tokenizer.json").read_text() == "{}"


def test_the_order_in_memory_is_not_saved(tmp_path: Path) -> None:
    model = trained()
    fold_(model)
    model.save_pretrained(tmp_path / "rows")
    to_column_major_(model)
    model.save_pretrained(tmp_path / "columns")
    rows, columns = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("rows", "columns")
    )
    assert rows == columns


def test_a_fold_takes_along_what_belongs_to_a_model_and_nothing_else(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path / "unfolded")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"):
        (tmp_path / "unfolded" / name).write_text("of the training")
    for name in ("manifest.json", "pytorch_model.bin", "model.fp16.safetensors", "notes.txt", ".hidden"):
        (tmp_path / "unfolded" / name).write_text("stale, or not ours")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (tmp_path / "unfolded" / name).write_text("of the model")
    fold_checkpoint(tmp_path / "unfolded", tmp_path / "folded")
    assert {path.name for path in (tmp_path / "folded").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "modeling_lowrank_llama.py"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    }


def test_a_checkpoint_of_foldrank_0_1_loads_and_folds(tmp_path: Path) -> None:
    low_rank = LowRankConfig(
        rank=3, backbone="sltrain", extra_config={"density": 0.2}, residual=ResidualConfig(alpha=0.9)
    )
    model = trained(low_rank)
    model.save_pretrained(tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    config["low_rank"]["options"] = config["low_rank"].pop("extra_config")
    # A pattern that was meant for the base model, which no layer of the language model has.
    config["low_rank"]["exclude"] = [r"^layers\.9\.mlp\.up_proj$"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "old")), logits(model))
    fold_checkpoint(tmp_path / "old", tmp_path / "folded")
    fold_(model)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "folded")), logits(model))


def test_converting_twice_says_that_it_is_one_already() -> None:
    with pytest.raises(ValueError, match="the model is a LowRankLlamaForCausalLM already"):
        convert_(trained())
