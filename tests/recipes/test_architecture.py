"""A model by its config: what is read, what is replaced, what is refused, and what a recipe keeps of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import GPT2Config, LlamaConfig, Qwen3Config

from foldrank.core.inventory import count_parameters, low_rank_layers
from foldrank.recipes import RECIPES, Recipe, load_recipe
from foldrank.recipes.families import BY_CONFIG, SHAPES
from foldrank.recipes.model_config import ModelConfig
from foldrank.train.model import check_recipe, dense_parameters, meta_model, shape_of
from foldrank.train.stand_ins import total

QWEN = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layer_types": ["full_attention"] * 3,
    "vocab_size": 99,
}

PARAMETERS = {
    "llama3-1b": 1_235_814_400,
    "llama3-8b": 8_030_261_248,
    "qwen3-0.6b": 596_049_920,
    "mistral-7b": 7_241_732_096,
    "gpt2-124m": 124_439_808,
}
"""Of the models that the shapes are those of."""


def written(folder: Path, **fields: Any) -> str:
    (folder / "config.json").write_text(json.dumps({**QWEN, **fields}))
    return str(folder)


def test_a_folder_a_file_and_the_fields_are_one_model(tmp_path: Path):
    folder = written(tmp_path, bos_token_id=1, architectures=["Qwen3ForCausalLM"], dtype="bfloat16")
    by_folder, by_file, by_fields = (
        load_recipe("demo", {"model.config": config, "low_rank": None})
        for config in (folder, f"{folder}/config.json", QWEN)
    )
    assert by_folder == by_file == by_fields
    assert by_folder.model == ModelConfig(config=folder)
    assert by_folder.model.vocab_size == 99
    config = meta_model(by_folder).config
    assert {name: getattr(config, name) for name in QWEN} == QWEN
    assert config.bos_token_id is None


def test_sizes_can_be_read_by_the_names_of_the_short_form():
    qwen, gpt2 = ModelConfig(config=QWEN), RECIPES["gpt2-124m-dense"].model
    assert (qwen.hidden_size, qwen.num_layers, qwen.num_heads, qwen.num_key_value_heads) == (32, 3, 4, 2)
    assert (gpt2.hidden_size, gpt2.num_layers, gpt2.num_heads, gpt2.intermediate_size) == (768, 12, 12, 3072)
    assert (gpt2.num_key_value_heads, gpt2.max_position_embeddings) == (None, 1024)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, GPT2Config])
def test_what_transformers_saves_is_read(tmp_path: Path, config: Any):
    saved = config(num_hidden_layers=2, hidden_size=32, num_attention_heads=4)
    saved.save_pretrained(tmp_path)
    recipe = load_recipe("demo", {"model.config": str(tmp_path), "low_rank": None})
    built = meta_model(recipe).config.to_dict()
    differ = {name for name, value in saved.to_dict().items() if built[name] != value}
    assert differ <= {"bos_token_id", "eos_token_id", "dtype"}


def test_fields_are_replaced_and_lists_by_layer_cut(tmp_path: Path):
    folder = written(tmp_path)
    model = ModelConfig(config=folder, fields={"num_hidden_layers": 2, "vocab_size": None})
    assert isinstance(model.config, dict)
    assert (model.num_layers, model.config["layer_types"], model.vocab_size) == (2, ["full_attention"] * 2, None)
    assert model.fields is None
    assert model.with_layers(1).num_layers == 1
    recipe = load_recipe("demo", {"model.config": folder, "model.vocab_size": 640})
    assert recipe.override({"model.fields": {"head_dim": 8}}).model.head_dim == 8
    assert recipe.override({"model.fields": {"head_dim": 8}}).model.vocab_size == 640
    assert recipe.override({"model.config": None}).model == ModelConfig()


def test_a_recipe_keeps_the_fields_and_needs_the_file_no_more(tmp_path: Path):
    recipe = load_recipe("demo", {"model.config": written(tmp_path)})
    (tmp_path / "config.json").unlink()
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    kept = tmp_path / "kept.yaml"
    kept.write_text(yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(str(kept)) == recipe
    assert set(recipe.to_dict()["model"]) == {"config", "fields", "vocab_size"}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"low_rank": {"rank": 3}}, "it is of a low-rank model; name the config of the dense one"),
        ({"quantization_config": {"bits": 4}}, "it is of quantized weights"),
        ({"model_type": None}, "it has no model_type"),
        ({"hidden_size": "wide"}, "hidden_size or n_embd must be a whole number, got 'wide'"),
        ({"num_hidden_layers": True}, "num_hidden_layers or n_layer must be a whole number, got True"),
        ({"num_hidden_layers": 2_000_000_000}, "num_layers must be at most 512"),
        ({"vocab_size": 1.5}, "vocab_size must be a whole number"),
    ],
)
def test_a_file_that_will_not_do_is_one_line(tmp_path: Path, fields: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says) as error:
        load_recipe("demo", {"model.config": written(tmp_path, **fields)})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model.config": QWEN, "model.num_layers": 2}, "model.num_layers is of the short form"),
        (
            {"model.config": QWEN, "model.fields": {"num_layers": 2}},
            "no field 'num_layers' to replace; the nearest are",
        ),
        ({"model.fields": {"num_layers": 2}}, "fields are of a config, and none is named"),
        ({"model.config": "nowhere"}, "nowhere cannot be read as JSON"),
        (
            {"model.config": "no/where"},
            "model.config: there is no such file here; on the hub no/where: the hub cannot be reached",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(settings: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says) as error:
        load_recipe("demo", settings)
    assert "\n" not in str(error.value)


def test_another_value_than_the_config_s_is_refused():
    with pytest.raises(ValueError, match="num_layers 5 is not the config's, 3: replace it in fields"):
        replace(ModelConfig(config=QWEN), num_layers=5)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "mixtral"}, "of the family 'mixtral': it has no low-rank classes; those that have are .*gpt2,"),
        ({"model_type": "qwen33"}, "of the family 'qwen33': transformers has no such family"),
        ({"num_key_value_heads": 3}, "its sizes do not go together"),
        ({"hidden_act": "warm"}, "its sizes do not go together: 'warm'"),
        ({"rms_norm_eps": "small"}, "not what transformers takes: .*'rms_norm_eps' expected float"),
        ({"max_position_embeddings": 64}, "train.sequence_length 128 is more than the 64 positions"),
    ],
)
def test_an_architecture_that_cannot_train_is_refused_before_any_work(fields: dict[str, Any], says: str):
    recipe = load_recipe("tiny-dense", {"model.config": {**QWEN, **fields}})
    with pytest.raises(ValueError, match=says):
        check_recipe(recipe)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shapes_that_ship(shape: str):
    assert dense_parameters(RECIPES[f"{shape}-dense"]) == PARAMETERS[shape]
    for method in ("lowrank", "lowrank-dlr", "cola", "cola-dlr"):
        recipe = RECIPES[f"{shape}-{method}"]
        check_recipe(recipe)
        assert replace(recipe, low_rank=None) == RECIPES[f"{shape}-dense"]
        model = meta_model(recipe)
        layers = low_rank_layers(model)
        assert len(layers) == recipe.model.num_layers * (4 if "gpt2" in shape else 7)
        assert all((layer.residual is not None) == ("-dlr" in method) for layer in layers.values())
        assert total(shape_of(recipe), count_parameters) == count_parameters(model) < 0.8 * PARAMETERS[shape]
    assert {f"{shape}-cola-dlr", f"{shape}-cola-dlr-muon"} <= RECIPES.keys()
    assert f"{shape}-cola-dlr" in BY_CONFIG
