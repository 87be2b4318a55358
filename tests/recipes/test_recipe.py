"""Settings: found, read, replaced, checked, written, and equal again."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from foldrank import LowRankConfig, ResidualConfig
from foldrank.data.config import DataConfig
from foldrank.recipes import RECIPES
from foldrank.recipes.model_config import ModelConfig
from foldrank.recipes.reading import flatten, load_recipe
from foldrank.recipes.schema import Recipe, field_help
from foldrank.recipes.train_config import TrainConfig

TABLES = Recipe(
    model=ModelConfig(hidden_size=32, num_layers=2),
    low_rank=LowRankConfig(
        rank={"mlp.up_proj": 5, r".*\.q_proj": 0.25, "model.layers.0.self_attn.k_proj": 3},
        activation="gelu",
        targets=("up_proj", "q_proj", "layers.0.self_attn.k_proj"),
        exclude=("layers.1.mlp.up_proj",),
        residual=ResidualConfig(
            alpha={"mlp.up_proj": 0.5, "q_proj": 2.0}, trainable=True, expansion="random", scope=("up_proj", "q_proj")
        ),
    ),
    data=DataConfig(source="some/folder", validation_fraction=0.2),
    train=TrainConfig(betas=(0.9, 0.95), eval_tokens=1000, micro_batch_size=4, report_to=("tensorboard",)),
    seed=7,
    sample_prompt=" with: {yaml} signs # and spaces ",
)
KNOWN = {**RECIPES, "tables": TABLES, "defaults": Recipe()}


@pytest.mark.parametrize("name", KNOWN)
def test_a_recipe_survives_its_files(name: str, tmp_path: Path) -> None:
    recipe = KNOWN[name]
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    assert load_recipe(str(file)) == recipe


def value_at(recipe: Recipe, dotted: str) -> Any:
    value: Any = recipe
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("train.steps", 7, 7),
        ("train.learning_rate", 1, 1.0),
        ("train.learning_rate", 6e-3, 0.006),
        ("train.betas", [0.9, 0.95], (0.9, 0.95)),
        ("train.micro_batch_size", 4, 4),
        ("train.eval_tokens", None, None),
        ("model.tie_embeddings", True, True),
        ("train.activation_checkpointing", "latents", "latents"),
        ("low_rank", None, None),
        ("low_rank.residual", None, None),
        ("low_rank.activation", None, None),
        ("low_rank.rank", 0.25, 0.25),
        ("low_rank.rank", {"mlp.up_proj": 4, "q_proj": 0.5}, {"mlp.up_proj": 4, "q_proj": 0.5}),
        ("low_rank.residual.alpha", {"mlp.up_proj": 2}, {"mlp.up_proj": 2.0}),
        ("low_rank.residual.scope", ["up_proj"], ("up_proj",)),
        ("data.tokenizer", "some/folder", "some/folder"),
        ("seed", 3, 3),
    ],
)
def test_one_setting_is_replaced_and_no_other(name: str, given: Any, expected: Any) -> None:
    demo = RECIPES["demo"]
    changed = load_recipe("demo", {name: given})
    found = value_at(changed, name)
    assert found == expected
    assert type(found) is type(expected)
    before, after = flatten(demo.to_dict()), flatten(changed.to_dict())
    others = {key for key in before.keys() & after.keys() if key != name}
    assert all(before[key] == after[key] for key in others)
    assert all(f"{key}.".startswith(f"{name}.") for key in before.keys() ^ after.keys())


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"train.steps": 0}, "train: steps must be at least 1, got 0"),
        ({"train.steps": 1.5}, "train.steps: .*integer.* got 1.5"),
        ({"train.steps": "many"}, "train.steps: should be a number, got 'many'"),
        ({"train.steps": None}, "train.steps: .*integer.* got None"),
        ({"train.betas": [0.9]}, "train.betas"),
        ({"train.betas": [0.9, 1.0]}, r"betas must lie in \[0, 1\)"),
        ({"train.learning_rate": 0}, "learning_rate must be a number above 0, got 0"),
        ({"train.learning_rate": float("nan")}, "learning_rate must be .* got nan"),
        ({"train.learning_rate": float("inf")}, "learning_rate must be .* got inf"),
        ({"train.weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"train.max_grad_norm": 0}, "max_grad_norm must be a number above 0, got 0"),
        ({"train.min_learning_rate_ratio": 1.5}, r"min_learning_rate_ratio must lie in \[0, 1\], got 1.5"),
        ({"train.warmup_ratio": 1}, r"warmup_ratio must lie in \[0, 1\), got 1"),
        ({"train.eval_tokens": 0}, "eval_tokens must be at least 1, got 0"),
        ({"train.micro_batch_size": 0}, "micro_batch_size must be at least 1, got 0"),
        ({"train.dtype": "float16"}, "dtype must be float32 or bfloat16, got 'float16'"),
        ({"train.device": "tpu"}, "device must be auto or cpu, got 'tpu'"),
        ({"train.activation_checkpointing": True}, "activation_checkpointing: .* 'block' or 'latents', got True"),
        ({"train": 5}, "train: .*got 5"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"data.vocab_size": 3}, "vocab_size must be at least 262, got 3"),
        ({"low_rank.rank": 0}, "rank must be at least 1, got 0"),
        ({"low_rank.rank": 1.5}, "rank as a fraction must lie between 0 and 1, got 1.5"),
        ({"low_rank.rank": "x"}, "low_rank.rank.*got 'x'"),
        ({"low_rank.rank": {}}, "rank is an empty table"),
        ({"low_rank.activation": "swish"}, "low_rank.activation: .*'silu'.* got 'swish'"),
        ({"low_rank.residual.expansion": "tiled"}, "low_rank.residual.expansion: .* got 'tiled'"),
        ({"low_rank.residual.scope": "some"}, "scope must be one of all, attention, mlp"),
        ({"low_rank.residual": 3}, "low_rank.residual: .*got 3"),
        ({"train.learning_rat": 1}, "no setting 'train.learning_rat'; the nearest are train.learning_rate, "),
        ({"low_rank.residual.alfa": 1}, "no setting 'low_rank.residual.alfa'; the nearest are low_rank.residual.alpha"),
        ({"steps": 3}, "no setting 'steps'; the nearest are train.steps"),
        ({"train.steps.x": 3}, "train.steps"),
        ({"": 3}, "no setting ''"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as said:
        load_recipe("demo", settings)
    assert "\n" not in str(said.value)


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"steps must be .*; learning_rate must be .*rank must be|rank must be.*steps"):
        load_recipe("demo", {"train.steps": 0, "train.learning_rate": -1, "low_rank.rank": 0})


def test_a_dense_recipe_becomes_low_rank() -> None:
    assert Recipe().low_rank is None
    assert Recipe().override({"low_rank.rank": 4}).low_rank == LowRankConfig(rank=4)
    with pytest.raises(ValueError, match="low_rank: LowRankConfig: rank is missing"):
        Recipe().override({"low_rank.activation": "silu"})


def write(folder: Path, text: str) -> str:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return str(file)


def test_a_file_takes_the_rest_from_its_base(tmp_path: Path) -> None:
    name = write(tmp_path, "base: demo\nseed: 3\nmodel: {hidden_size: 64}\nlow_rank: {residual: null}\n")
    expected = load_recipe("demo", {"seed": 3, "model.hidden_size": 64, "low_rank.residual": None})
    assert load_recipe(name) == expected
    assert load_recipe(name, {"seed": 4}) == expected.override({"seed": 4})


def test_a_file_may_derive_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("base: demo\nseed: 3\n")
    name = write(tmp_path, f"base: {tmp_path / 'base.yaml'}\ntrain: {{steps: 2}}\n")
    assert load_recipe(name) == load_recipe("demo", {"seed": 3, "train.steps": 2})


def test_tables_by_pattern_keep_their_dots(tmp_path: Path) -> None:
    text = "base: demo\nlow_rank:\n  rank: {mlp.up_proj: 5, q_proj: 2}\n  residual:\n    alpha: {mlp.up_proj: 0.5}\n"
    low_rank = load_recipe(write(tmp_path, text)).low_rank
    assert low_rank is not None
    assert low_rank.rank == {"mlp.up_proj": 5, "q_proj": 2}
    assert low_rank.residual is not None
    assert low_rank.residual.alpha == {"mlp.up_proj": 0.5}


def test_a_table_replaces_the_table_of_the_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("base: demo\nlow_rank: {rank: {up_proj: 5, q_proj: 2}}\n")
    name = write(tmp_path, f"base: {tmp_path / 'base.yaml'}\nlow_rank: {{rank: {{k_proj: 4}}}}\n")
    low_rank = load_recipe(name).low_rank
    assert low_rank is not None
    assert low_rank.rank == {"k_proj": 4}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "cannot be read as a recipe: it holds NoneType"),
        ("- 1\n", "cannot be read as a recipe: it holds list"),
        ("train: [\n", "cannot be read as a recipe"),
        ("train: {steps: 0}\n", "steps must be at least 1"),
        ("trian: {steps: 3}\n", "no setting 'trian"),
        ("1: 2\n", "no setting '1'"),
        ("base: dmeo\n", "no recipe is called 'dmeo'; the nearest are demo"),
        ("\x00", "cannot be read as a recipe"),
    ],
)
def test_a_wrong_file_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize("name", ["no.yaml", "."])
def test_a_file_that_cannot_be_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ValueError, match=r"no\.yaml cannot be read|no recipe is called '\.'"):
        load_recipe(name)
    with pytest.raises(ValueError, match=r"folder\.yaml cannot be read"):
        load_recipe("folder.yaml")


def test_every_setting_is_explained() -> None:
    explained = field_help()
    assert {"seed", "train.steps", "model.hidden_size", "low_rank.rank", "low_rank.residual.alpha"} <= explained.keys()
    assert all(explained.values())
