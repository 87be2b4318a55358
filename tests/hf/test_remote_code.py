"""A folded checkpoint needs torch and transformers, not foldrank."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from foldrank import LowRankConfig, ResidualConfig, fold_
from foldrank.hf import LowRankLlamaForCausalLM, LowRankLlamaModel, modeling_lowrank_llama
from foldrank.hf.remote_code import auto_map

from .models import COLA_DLR, TOKENS, config, hidden, logits, trained

NAMES = [f"folded-{how}-{dtype}" for how in ("untied", "tied") for dtype in ("float32", "bfloat16")]
NAMES += ["folded-crnet-float32"]
CRNET = LowRankConfig(rank=3, backbone="crnet", dense_first=1, residual=ResidualConfig())

WITHOUT_FOLDRANK = """
import runpy, sys
sys.modules["foldrank"] = None  # importing it is now an ImportError
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without foldrank makes of our checkpoints."""
    root = tmp_path_factory.mktemp("remote-code")
    for name in NAMES:
        _, how, dtype = name.split("-")
        low_rank = CRNET if how == "crnet" else COLA_DLR
        model = trained(low_rank, getattr(torch, dtype), tie_word_embeddings=how == "tied")
        fold_(model)
        model.save_pretrained(root / name)
        expected = {"tokens": TOKENS, "logits": logits(model), "hidden": hidden(model.model)}  # pyright: ignore[reportArgumentType]
        save_file(expected, root / f"{name}.expected")
    trained().save_pretrained(root / "unfolded")
    program = [sys.executable, "-c", WITHOUT_FOLDRANK, str(Path(__file__).with_name("remote_code.py")), str(root)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads((root / "facts.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_equal_to_the_last_bit(elsewhere: dict[str, Any], name: str) -> None:
    facts = elsewhere[name]
    assert facts["class"] == "LowRankLlamaForCausalLM"
    assert facts["dtype"] == "torch." + name.rpartition("-")[2]
    assert facts["logits equal"]
    assert facts["hidden equal"]
    assert facts["residuals"] == []


@pytest.mark.parametrize("name", NAMES)
def test_it_generates_with_its_cache(elsewhere: dict[str, Any], name: str) -> None:
    facts = elsewhere[name]
    assert len(facts["cached"][0]) == 16
    assert facts["cached"] == facts["uncached"]


@pytest.mark.parametrize("name", NAMES)
def test_it_saves_and_loads_again(elsewhere: dict[str, Any], name: str) -> None:
    facts = elsewhere[name]
    assert {"config.json", "model.safetensors", "modeling_lowrank_llama.py"} <= set(facts["saved again"])
    assert facts["again equal"]


def test_no_code_of_a_checkpoint_runs_unasked(elsewhere: dict[str, Any]) -> None:
    assert elsewhere["config"] == "LowRankLlamaConfig"
    assert "trust_remote_code=True" in elsewhere["without trust"]
    assert "trust_remote_code=True" in elsewhere["without a word on trust"]


def test_what_is_not_folded_does_not_load(elsewhere: dict[str, Any]) -> None:
    assert elsewhere["unfolded"] == (
        "this checkpoint is not folded: import foldrank.hf, or fold it (foldrank fold CHECKPOINT)"
    )


@pytest.fixture(scope="module")
def remote_code() -> ModuleType:
    """The modelling file, imported under a name of its own."""
    file = modeling_lowrank_llama.__file__
    spec = importlib.util.spec_from_file_location("remote_code", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("others", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize(
    "low_rank",
    [
        LowRankConfig(rank=3, activation="silu", residual=ResidualConfig()),
        LowRankConfig(rank=3),
        LowRankConfig(rank={"up_proj": 5, "q_proj": 2}, activation="tanh", exclude=["layers.0.mlp.up_proj"]),
        LowRankConfig(rank=4, activation="gelu", residual=ResidualConfig(expansion="random", scope="mlp")),
        LowRankConfig(rank=4, activation="relu"),
        None,
    ],
    ids=["cola-dlr", "low rank", "table", "random", "relu", "dense"],
)
def test_its_classes_equal_those_of_the_package(
    remote_code: ModuleType, low_rank: LowRankConfig | None, others: dict[str, Any], tmp_path: Path
) -> None:
    model = trained(low_rank, **others)
    fold_(model)
    model.save_pretrained(tmp_path)
    twin = remote_code.LowRankLlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert type(twin).__module__ == "remote_code"
    ours, theirs = model.state_dict(), twin.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert torch.equal(logits(twin), logits(model))
    base = remote_code.LowRankLlamaModel.from_pretrained(tmp_path).eval()
    assert torch.equal(hidden(base), hidden(LowRankLlamaModel.from_pretrained(tmp_path)))


def test_its_names_are_those_of_the_auto_map(remote_code: ModuleType) -> None:
    for place in auto_map(config(), config().low_rank or {}).values():
        file, name = place.split(".")
        assert file == "modeling_lowrank_llama"
        assert hasattr(remote_code, name)


def test_here_our_own_classes_are_used_even_with_trust(tmp_path: Path) -> None:
    model = trained()
    fold_(model)
    model.save_pretrained(tmp_path)
    (tmp_path / "modeling_lowrank_llama.py").write_text("raise SystemExit('code of a checkpoint ran')\n")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LowRankLlamaForCausalLM
