"""Each family on each backbone, with and without the residual, from conversion to a process without foldrank."""

import copy
import json
import pickle
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

import foldrank.hf
from foldrank import LowRankConfig, LowRankLinear, ResidualConfig, factorize_, fold_
from foldrank.commands import info
from foldrank.core.inventory import count_parameters, low_rank_layers
from foldrank.hf import LowRankGPT2ForCausalLM, LowRankLlamaForCausalLM, convert_, low_rank_classes
from foldrank.hf.checkpoint import fold_checkpoint, inspect
from foldrank.hf.families import LOW_RANK_CLASSES
from foldrank.hf.remote_code import FAMILIES, modeling_source
from foldrank.surgery.backbones import BACKBONES

from .models import SHAPE, TOKENS, hidden, logits

# A further architecture, as a user's module would have it: one call, three names.
LowRankQwen2Config, LowRankQwen2Model, LowRankQwen2ForCausalLM = low_rank_classes(Qwen2ForCausalLM, __name__)

FAMILY: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "Llama": (LlamaForCausalLM, LlamaConfig),
    "Mistral": (MistralForCausalLM, MistralConfig),
    "Qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "GPT2": (GPT2LMHeadModel, GPT2Config),
    "Qwen2": (Qwen2ForCausalLM, Qwen2Config),
}
SHIPPED = [family for family in FAMILY if family != "Qwen2"]
SHAPES: dict[str, dict[str, Any]] = {
    "Mistral": {**SHAPE, "num_key_value_heads": 1},
    "Qwen3": {**SHAPE, "num_key_value_heads": 1, "head_dim": 10},
    "Qwen2": {**SHAPE, "num_key_value_heads": 1},
    "GPT2": {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1}
    | {"eos_token_id": 2, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0},
}
METHODS = {
    "lowrank": LowRankConfig(rank=3),
    "cola": LowRankConfig(rank=3, activation="silu"),
    "sltrain": LowRankConfig(rank=3, backbone="sltrain", extra_config={"density": 0.2}, scale=0.3),
}
DLR = {"": None, "-dlr": ResidualConfig(alpha=0.9)}
CELLS = {
    f"{family}-{method}{dlr}": (family, replace(config, residual=residual))
    for family in SHIPPED
    for method, config in METHODS.items()
    for dlr, residual in DLR.items()
}
OTHERS = {
    "GPT2-trainable": (
        "GPT2",
        replace(METHODS["sltrain"], scale="trainable", residual=ResidualConfig(trainable=True, expansion="random")),
    ),
    "Qwen3-table": ("Qwen3", LowRankConfig(rank={"q_proj": 2, "up_proj": 0.5}, activation="tanh", scale=0.3)),
    "Qwen2-cola-dlr": ("Qwen2", replace(METHODS["cola"], residual=ResidualConfig())),
    "Qwen2-sltrain-dlr": ("Qwen2", replace(METHODS["sltrain"], residual=ResidualConfig())),
}
CELLS |= OTHERS

cell = pytest.mark.parametrize("name", CELLS)


def dense(family: str, seed: int = 0) -> PreTrainedModel:
    causal, config = FAMILY[family]
    torch.manual_seed(seed)
    return causal(config(**SHAPES.get(family, SHAPE)))


def step(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(1)
    for parameter in model.parameters():
        # SLTrain's B starts at zero: away from there, so that no part of the layer is without effect.
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    return model.eval()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each cell is found to be on its way, on this side of the border."""
    root, found = tmp_path_factory.mktemp("families"), {}
    for name, (family, config) in CELLS.items():
        model = dense(family)
        convert_(model, config)
        step(model)
        unfolded, folded = root / f"unfolded-{name}", root / f"folded-{name}"
        model.save_pretrained(unfolded)
        facts: dict[str, Any] = {"model": copy.deepcopy(model), "unfolded": unfolded, "folded": folded, "root": root}
        facts["logits"] = logits(model)
        report = fold_(model)
        facts["drift"] = report.max_abs_error
        facts["folded logits"] = logits(model)
        model.save_pretrained(folded)
        expected = {"tokens": TOKENS, "logits": facts["folded logits"], "hidden": hidden(model.base_model)}  # pyright: ignore[reportArgumentType]
        save_file(expected, folded.with_suffix(".expected"))
        found[name] = facts
    return found


ELSEWHERE = """
import json, runpy, sys
sys.modules["foldrank"] = None  # importing it is now an ImportError
from pathlib import Path
import torch
from safetensors.torch import load_file
torch.set_num_threads(1)
facts = runpy.run_path(sys.argv[1])["facts"]
folders = sorted(folder for folder in Path(sys.argv[2]).glob("folded-*") if folder.is_dir())
found = {folder.name: facts(folder, load_file(folder.with_suffix(".expected"))) for folder in folders}
(Path(sys.argv[2]) / "facts.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def elsewhere(run: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What one process without foldrank makes of all folded checkpoints."""
    root = next(iter(run.values()))["root"]
    program = [sys.executable, "-c", ELSEWHERE, str(Path(__file__).with_name("remote_code.py")), str(root)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((root / "facts.json").read_text())


@cell
def test_a_saved_model_loads_with_equal_logits(run: dict[str, dict[str, Any]], name: str) -> None:
    facts, (family, config) = run[name], CELLS[name]
    again = AutoModelForCausalLM.from_pretrained(facts["unfolded"])
    assert type(again) is LOW_RANK_CLASSES[FAMILY[family][0]]
    assert torch.equal(logits(again), facts["logits"])
    layers = low_rank_layers(again).values()
    assert {type(layer) for layer in layers} == {BACKBONES[config.backbone]}
    assert {bool(layer.weight_parametrizations) for layer in layers} == {bool(config.residual or config.scale)}
    assert repr(again) == repr(facts["model"])


@cell
def test_the_fold_changes_rounding_alone(run: dict[str, dict[str, Any]], name: str) -> None:
    facts, (_, config) = run[name], CELLS[name]
    assert (facts["drift"] > 0) == bool(config.residual or config.scale)
    assert facts["drift"] < 1e-6
    torch.testing.assert_close(facts["folded logits"], facts["logits"], rtol=1e-5, atol=1e-5)
    again = AutoModelForCausalLM.from_pretrained(facts["folded"])
    assert torch.equal(logits(again), facts["folded logits"])


@cell
def test_a_checkpoint_on_disk_folds_as_the_model_does(
    run: dict[str, dict[str, Any]], name: str, tmp_path: Path
) -> None:
    facts, (_, config) = run[name], CELLS[name]
    if not (config.residual or config.scale):
        with pytest.raises(ValueError, match="is folded: there is no residual to fold"):
            fold_checkpoint(facts["unfolded"], tmp_path / "folded")
        return
    fold_checkpoint(facts["unfolded"], tmp_path / "folded")
    written, expected = tensors_of(tmp_path / "folded"), tensors_of(facts["folded"])
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)
    assert {path.name for path in (tmp_path / "folded").iterdir()} == {path.name for path in facts["folded"].iterdir()}
    for file in [*(tmp_path / "folded").glob("*.json"), *(tmp_path / "folded").glob("*.py")]:
        assert file.read_bytes() == (facts["folded"] / file.name).read_bytes()


@cell
def test_without_foldrank_it_loads_generates_and_saves_again(
    run: dict[str, dict[str, Any]], elsewhere: dict[str, Any], name: str
) -> None:
    family, _ = CELLS[name]
    facts = elsewhere[run[name]["folded"].name]
    assert facts["class"] == f"LowRank{family}ForCausalLM"
    assert facts["logits equal"]
    assert facts["hidden equal"]
    assert len(facts["cached"][0]) == 16
    assert facts["cached"] == facts["uncached"]
    assert f"modeling_lowrank_{family.lower()}.py" in facts["saved again"]
    assert facts["again equal"]


@cell
def test_it_can_be_inspected(run: dict[str, dict[str, Any]], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    facts, (family, config) = run[name], CELLS[name]
    found = inspect(facts["unfolded"])
    assert found.model_type == f"lowrank_{family.lower()}"
    assert found.state == ("unfolded" if config.residual or config.scale else "folded")
    assert found.params == count_parameters(facts["model"])
    assert inspect(facts["folded"]).state == "folded"
    info.show(info.run(Namespace(checkpoint=facts["unfolded"])))
    shown = capsys.readouterr().out
    assert config.backbone in shown
    assert ("density 0.2" in shown) == (config.backbone == "sltrain")
    if config.scale is not None:
        assert str(config.scale) in shown


@pytest.mark.parametrize("family", FAMILY)
def test_a_converted_model_is_the_one_its_class_builds(family: str) -> None:
    config = replace(METHODS["sltrain"], residual=ResidualConfig())
    converted = dense(family)
    head = converted.get_output_embeddings()
    report = convert_(converted, config)
    assert report is not None
    assert converted.get_output_embeddings() is head
    assert len(report.converted) == (8 if family == "GPT2" else 14)
    low_rank_class = LOW_RANK_CLASSES[FAMILY[family][0]]
    torch.manual_seed(0)
    config_class: Any = low_rank_class.config_class
    built = low_rank_class(config_class(**SHAPES.get(family, SHAPE), low_rank=config))
    assert type(converted) is type(built)
    assert converted.config.to_dict() == built.config.to_dict()
    ours, theirs = converted.state_dict(), built.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_factorized_model_is_converted_as_it_is(tmp_path: Path) -> None:
    model = dense("Llama")
    shared = model.config
    factorize_(model, LowRankConfig(rank=3, activation="silu"))
    expected = logits(step(model))
    assert convert_(model) is None
    assert type(model) is LowRankLlamaForCausalLM
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    assert type(shared) is LlamaConfig
    assert not hasattr(shared, "low_rank")


def test_a_factorized_model_does_not_save_what_would_load_with_random_weights(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=24, num_hidden_layers=1))
    factorize_(model, LowRankConfig(rank=2))
    arguments = TrainingArguments(output_dir=str(tmp_path / "trainer"), use_cpu=True, report_to=[])
    for save in (
        lambda: model.save_pretrained(tmp_path / "out"),
        lambda: model.model.save_pretrained(tmp_path / "out"),
        lambda: copy.deepcopy(model).save_pretrained(tmp_path / "out"),
        lambda: Trainer(model=model, args=arguments).save_model(str(tmp_path / "out")),
    ):
        with pytest.raises(ValueError, match=r"Say what it is with foldrank\.hf\.convert_"):
            save()
    convert_(model)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_a_base_model_is_converted_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModel.from_config(GPT2Config(**SHAPES["GPT2"]))
    convert_(model, METHODS["cola"])
    assert type(model) is foldrank.hf.LowRankGPT2Model
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(hidden(AutoModel.from_pretrained(tmp_path)), hidden(model))


def test_what_cannot_be_converted_is_refused() -> None:
    with pytest.raises(ValueError, match="no low-rank layer: give a config, or factorize_ it first"):
        convert_(dense("Llama"))
    shape = {**SHAPE, "num_local_experts": 2}
    with pytest.raises(ValueError, match="MixtralForCausalLM has no low-rank class; those with one are GPT2LMHead"):
        convert_(MixtralForCausalLM(MixtralConfig(**shape)), METHODS["cola"])
    model = dense("Llama")
    with pytest.raises(ValueError, match="rank 17 is above"):
        convert_(model, LowRankConfig(rank=17))
    assert type(model) is LlamaForCausalLM


@pytest.mark.parametrize("family", FAMILY)
def test_objects_pickle_and_copy(family: str) -> None:
    model = dense(family)
    convert_(model, METHODS["cola"])
    model.eval()
    for duplicate in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(duplicate) is type(model)
        assert torch.equal(logits(duplicate), logits(model))
    assert type(pickle.loads(pickle.dumps(model.config))) is type(model.config)


@pytest.mark.parametrize("name", FAMILY)
def test_the_classes_are_named_and_found_like_any_other(name: str) -> None:
    home = foldrank.hf if name in SHIPPED else sys.modules[__name__]
    names = [f"LowRank{name}{kind}" for kind in ("Config", "Model", "ForCausalLM")]
    classes = [getattr(home, name) for name in names]
    assert [cls.__name__ for cls in classes] == names
    assert {cls.__module__ for cls in classes} == {"foldrank.hf.families" if name in SHIPPED else __name__}
    if name in SHIPPED:
        assert set(names) <= set(foldrank.hf.__all__)
    config_class = classes[0]
    family = FAMILIES[config_class]
    assert type(AutoConfig.for_model(family.model_type)) is config_class
    source = modeling_source(config_class)
    compile(source, family.modeling, "exec")
    assert f"class LowRank{family.name}ForCausalLM" in source
    assert ("Llama" in source) == (family.name == "Llama")


class PlainCopy(LowRankLinear):
    """A backbone of which the modelling file knows nothing."""


def test_a_backbone_that_the_modelling_file_does_not_know_stays_at_home(tmp_path: Path) -> None:
    BACKBONES["copy"] = PlainCopy
    try:
        model = dense("Llama")
        convert_(model, LowRankConfig(rank=3, backbone="copy", residual=ResidualConfig()))
        step(model)
        model.save_pretrained(tmp_path / "unfolded")
        fold_checkpoint(tmp_path / "unfolded", tmp_path / "folded")
        fold_(model)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
        assert {type(layer) for layer in low_rank_layers(again).values()} == {PlainCopy}
        assert torch.equal(logits(again), logits(model))
        assert not list((tmp_path / "folded").glob("*.py"))
        assert "auto_map" not in json.loads((tmp_path / "folded" / "config.json").read_text())
    finally:
        del BACKBONES["copy"]
    with pytest.raises(ValueError, match="backbone must be one of lowrank, sltrain"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "folded")


def test_gpt2_keeps_its_tied_head(run: dict[str, dict[str, Any]]) -> None:
    again = AutoModelForCausalLM.from_pretrained(run["GPT2-sltrain-dlr"]["folded"])
    assert isinstance(again, LowRankGPT2ForCausalLM)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight  # pyright: ignore
