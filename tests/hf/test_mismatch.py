"""Config and weights that disagree are an error that says what to do; nothing is loaded in part."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from foldrank import LowRankConfig, ResidualConfig, fold_
from foldrank.hf.checkpoint import inspect, load

from .models import COLA_DLR, config, trained

AUTO = pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel], ids=lambda auto: auto.__name__)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("both")
    model = trained()
    model.save_pretrained(folder / "unfolded")
    fold_(model)
    model.save_pretrained(folder / "folded")
    return folder


@pytest.fixture
def swapped(both: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    def swapped(weights: str, config: str) -> Path:
        shutil.copy(both / weights / "model.safetensors", tmp_path)
        shutil.copy(both / config / "config.json", tmp_path)
        return tmp_path

    return swapped


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((folder / "config.json").read_text())
    edit(fields)
    (folder / "config.json").write_text(json.dumps(fields))


@AUTO
def test_folded_weights_under_an_unfolded_config(swapped: Callable[[str, str], Path], auto: Any) -> None:
    with pytest.raises(
        ValueError, match="is folded but its config has a residual, which would be applied again"
    ) as said:
        auto.from_pretrained(swapped("folded", "unfolded"))
    assert "residual" in str(said.value)


@AUTO
def test_unfolded_weights_under_a_folded_config(swapped: Callable[[str, str], Path], auto: Any) -> None:
    with pytest.raises(ValueError, match=r"not folded but its config has no residual: fold it \(foldrank fold\)"):
        auto.from_pretrained(swapped("unfolded", "folded"))


@pytest.mark.parametrize(("weights", "settings"), [("folded", "unfolded"), ("unfolded", "folded")])
@pytest.mark.parametrize("read", [inspect, load])
def test_our_own_reading_refuses_too(
    swapped: Callable[[str, str], Path], weights: str, settings: str, read: Callable[[Path], object]
) -> None:
    with pytest.raises(ValueError, match="residual"):
        read(swapped(weights, settings))


def test_inspect_says_which_of_the_two_has_the_residual(swapped: Callable[[str, str], Path]) -> None:
    folder = swapped("folded", "unfolded")
    with pytest.raises(ValueError, match=r"the weights hold no residual and config\.json has one"):
        inspect(folder)
    folder = swapped("unfolded", "folded")
    with pytest.raises(ValueError, match=r"the weights hold a residual and config\.json has none"):
        inspect(folder)


@AUTO
@pytest.mark.parametrize(
    "edit",
    [
        lambda residual: residual.update(alpha=2.0),
        lambda residual: residual.update(expansion="balanced"),
        lambda residual: residual.update(variance_correction=False),
    ],
    ids=["alpha", "expansion", "variance correction"],
)
def test_another_residual_in_the_config(both: Path, tmp_path: Path, auto: Any, edit: Any) -> None:
    shutil.copytree(both / "unfolded", tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, lambda fields: edit(fields["low_rank"]["residual"]))
    with pytest.raises(ValueError, match=r"residual\.spec is of another residual than the config.s"):
        auto.from_pretrained(tmp_path)


@AUTO
@pytest.mark.parametrize("name", ["layers.1.mlp.up_proj.down.weight", "layers.0.input_layernorm.weight"])
@pytest.mark.parametrize("state", ["folded", "unfolded"])
def test_a_missing_tensor(both: Path, tmp_path: Path, auto: Any, state: str, name: str) -> None:
    shutil.copytree(both / state, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.{name}"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"not a whole checkpoint of a LowRankLlama\w+: 1 tensors are missing.*{name}"
    ):
        auto.from_pretrained(tmp_path)


def test_a_missing_residual_tensor(tmp_path: Path) -> None:
    trained(LowRankConfig(rank=3, residual=ResidualConfig(trainable=True))).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.residual.alpha"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing.*residual\.alpha|residual\.alpha.*missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@AUTO
def test_a_rank_that_is_not_that_of_the_weights(both: Path, tmp_path: Path, auto: Any) -> None:
    shutil.copytree(both / "folded", tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, lambda fields: fields["low_rank"]["rank"].update({"layers.0.mlp.up_proj": 4}))
    with pytest.raises((ValueError, RuntimeError), match=r"(?s)mismatch|does not fit"):
        auto.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("low_rank", "complaint"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": 3, "ranks": 4}, "unknown field ranks"),
        ({"activation": "silu"}, "rank is missing"),
        ({"rank": 3, "residual": {"alpha": "much"}}, "alpha must be a finite number"),
    ],
)
def test_a_wrong_field_in_the_config(low_rank: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        config(low_rank)


def test_a_rank_above_the_full_rank() -> None:
    with pytest.raises(ValueError, match=r"rank 17 is above the full rank 16 of model\.layers\.0\.self_attn\.q_proj"):
        AutoModelForCausalLM.from_config(config(LowRankConfig(rank=17)))


def test_a_state_dict_of_the_other_kind(both: Path) -> None:
    unfolded = load_file(both / "unfolded" / "model.safetensors")
    folded = load_file(both / "folded" / "model.safetensors")
    model = AutoModelForCausalLM.from_config(config(COLA_DLR))
    with pytest.raises(RuntimeError, match="the state dict is folded: it would be applied a second time"):
        model.load_state_dict(folded, strict=False)
    fold_(model)
    with pytest.raises(RuntimeError, match="is folded and the state dict is not"):
        model.load_state_dict(unfolded, strict=False)
    model.load_state_dict(folded)
    assert torch.equal(model.get_parameter("lm_head.weight"), folded["lm_head.weight"])
