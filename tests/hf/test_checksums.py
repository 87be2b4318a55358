"""A checkpoint that changed since it was saved is noticed when it is read; what cannot be read is said in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from foldrank.data.tokenizer import train_tokenizer
from foldrank.hf.checksums import CHECKSUMS

from ..called import Done, Foldrank
from ..small_runs import Run


@pytest.fixture
def checkpoint(finished_run: Run, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run.out / "folded", tmp_path / "folded")


@pytest.fixture
def unfolded(finished_run: Run, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run.out / "unfolded", tmp_path / "unfolded")


def refused(done: Done, complaint: str) -> None:
    assert complaint in done.stderr
    assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert len(done.stderr) <= 301


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0x01
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_flipped_bit_is_noticed_by_every_command(
    foldrank: Foldrank, checkpoint: Path, unfolded: Path, corpus: Path, name: str, tmp_path: Path
) -> None:
    for folder in (checkpoint, unfolded):
        # In the middle of the weights, or in JSON a blank, which leaves its meaning as it was.
        file = folder / name
        if name.endswith("safetensors"):
            flip(file, file.stat().st_size // 2)
        else:
            file.write_text(file.read_text().replace("\n", " \n", 1))
    commands: list[tuple[object, ...]] = [
        ("evaluate", checkpoint, "--data", corpus),
        ("generate", checkpoint, "--prompt", "bar"),
        ("info", checkpoint, "--verify"),
        ("fold", unfolded, "--out", tmp_path / "out"),
    ]
    for command in commands:
        refused(foldrank(*command), f"{name} not as saved (checksums differ)")
    assert not (tmp_path / "out").exists()
    accepted = foldrank("generate", checkpoint, "--prompt", "bar", "--accept-changes")
    assert (accepted.code, accepted.stderr.count("not as saved, and accepted")) == (0, 1)


def test_without_checksums_it_is_not_verified(foldrank: Foldrank, checkpoint: Path) -> None:
    assert foldrank("info", checkpoint, "--verify", "--json").json["verified"] == "every file is as it was saved"
    (checkpoint / CHECKSUMS).unlink()
    done = foldrank("generate", checkpoint, "--prompt", "bar", "--max-new-tokens", 4)
    assert (done.code, done.stderr) == (0, f"note: {checkpoint} has no {CHECKSUMS}: not verified\n")
    assert "not verified" in foldrank("info", checkpoint, "--verify").stdout


def test_a_folded_checkpoint_has_checksums_of_its_own(foldrank: Foldrank, unfolded: Path, tmp_path: Path) -> None:
    assert foldrank("fold", unfolded, "--out", tmp_path / "out").stderr == ""
    assert foldrank("info", tmp_path / "out", "--verify", "--json").json["verified"] == "every file is as it was saved"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "x"),
        ("hidden_size", 16.5),
        ("hidden_size", 3),
        ("hidden_size", None),
        ("hidden_size", -16),
        ("hidden_size", 10**9),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 0),
        ("hidden_act", 3),
        ("hidden_act", "unknown"),
        ("rms_norm_eps", "x"),
        ("dtype", "float7"),
        ("model_type", "unknown"),
        ("model_type", {"a": 1}),
        ("rope_parameters", 3),
        ("quantization_config", {"quant_method": "none such"}),
        ("low_rank", 8),
        ("low_rank.rank", 8),
        ("low_rank.backbone", 3),
        ("low_rank.residual", 3),
        ("low_rank.rank", {"(([a-z_.0-9]+)+)+Z": 4}),
    ],
)
def test_a_config_of_others_is_one_line(foldrank: Foldrank, checkpoint: Path, field: str, value: Any) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    *path, last = field.split(".")
    part = config
    for name in path:
        part = part[name]
    part[last] = value
    (checkpoint / "config.json").write_text(json.dumps(config))
    for command in (
        ("info", checkpoint),
        ("generate", checkpoint, "--prompt", "bar", "--accept-changes"),
        ("fold", checkpoint, "--out", checkpoint.parent / "again", "--accept-changes"),
    ):
        done = foldrank(*command)
        if field in ("dtype", "model_type"):
            refused(done, field)
        if done.code != 0:  # info reads no more of a config than it shows
            refused(done, "")
        assert done.code in (0, 2)


@pytest.mark.parametrize("content", ["null", "[]", "NaN", "[" * 5000, "", '{"a": ' * 3000])
def test_a_config_that_is_no_table_is_one_line(foldrank: Foldrank, checkpoint: Path, content: str) -> None:
    whole = (checkpoint / "config.json").read_text()
    (checkpoint / "config.json").write_text(content)
    refused(foldrank("info", checkpoint), "config.json")
    (checkpoint / "config.json").write_text(whole)
    (checkpoint / "generation_config.json").write_text(content)
    refused(foldrank("generate", checkpoint, "--prompt", "bar"), "generation_config.json")


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("tokenizer.json", "model.vocab", None),
        ("tokenizer.json", "model.vocab", []),
        ("tokenizer.json", "model.vocab", {"a": 10**9, "b": 1}),
        ("tokenizer.json", "model.vocab", {"a": 4 * 10**9}),
        ("tokenizer.json", "model.vocab", {"a": -5}),
        ("tokenizer.json", "model.vocab", {"a": 1, "b": 1}),
        ("tokenizer.json", "model.merges", [["no", "such"]]),
        ("tokenizer.json", "added_tokens", [{"id": 10**9, "content": "x"}]),
        ("tokenizer_config.json", "eos_token", 3),
        ("tokenizer_config.json", "tokenizer_class", 3),
        ("tokenizer_config.json", "model_max_length", "x"),
    ],
)
def test_a_tokenizer_of_others_is_one_line(
    foldrank: Foldrank, checkpoint: Path, corpus: Path, tmp_path: Path, file: str, field: str, value: Any
) -> None:
    content = json.loads((checkpoint / file).read_text())
    *path, last = field.split(".")
    part = content
    for name in path:
        part = part[name]
    part[last] = value
    (checkpoint / file).write_text(json.dumps(content))
    refused(foldrank("generate", checkpoint, "--prompt", "bar", "--accept-changes"), "tokenizer")
    refused(foldrank("prepare", corpus, "--tokenizer", checkpoint, "--out", tmp_path / "data"), "tokenizer")
    assert not list(tmp_path.glob("data*"))


def test_weights_that_are_there_in_another_form_are_named(foldrank: Foldrank, checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    for name, complaint in (
        ("pytorch_model.bin", "pytorch_model.bin is a pickle, which foldrank does not open"),
        ("model.fp16.safetensors", "there is model.fp16.safetensors: give it that name"),
        ("model-00001-of-00002.safetensors", "but no model.safetensors.index.json that says which tensor is where"),
    ):
        moved = weights.rename(checkpoint / name)
        refused(foldrank("info", checkpoint), complaint)
        moved.rename(weights)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_not_folded(
    foldrank: Foldrank, unfolded: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    file = unfolded / "model.safetensors"
    weights = {name: w.to(dtype) if name.endswith("up.weight") else w for name, w in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    refused(foldrank("fold", unfolded, "--out", tmp_path / "out", "--accept-changes"), "can be folded")


def test_weights_that_are_not_finite_do_not_generate(foldrank: Foldrank, checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"][0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    refused_last = foldrank("generate", checkpoint, "--prompt", "bar", "--accept-changes")
    assert refused_last.code == 2
    assert "outputs are not finite" in refused_last.stderr


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=32)).save_pretrained(folder)
    train_tokenizer(["some text of some length " * 20], 262).save_pretrained(folder)
    return folder


def test_learned_positions_are_not_passed(foldrank: Foldrank, gpt2: Path, corpus: Path) -> None:
    for command in (
        ("evaluate", gpt2, "--data", corpus, "--sequence-length", 64),
        ("generate", gpt2, "--prompt", "some", "--max-new-tokens", 40),
    ):
        done = foldrank(*command)
        assert done.code == 2
        assert "positions are more than the 32 that this model has learned" in done.stderr
    assert foldrank("evaluate", gpt2, "--data", corpus, "--sequence-length", 32).code == 0


def test_a_tokenizer_larger_than_the_embedding_is_refused(
    foldrank: Foldrank, gpt2: Path, corpus: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(gpt2, tmp_path / "gpt2")
    texts = [file.read_text() for file in corpus.rglob("*") if file.is_file()]
    train_tokenizer(texts, 384).save_pretrained(folder)
    done = foldrank("evaluate", folder, "--data", corpus, "--sequence-length", 16)
    assert done.code == 2
    assert "the tokenizer has ids up to 383 and the model's embedding 320 entries" in done.stderr
