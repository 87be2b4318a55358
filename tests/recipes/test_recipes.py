"""The shipped recipes: every one builds on the meta device, with the published sizes, and pairs differ in one thing."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import yaml

from foldrank.core.inventory import count_parameters, low_rank_layers
from foldrank.data.tokenizer import train_tokenizer
from foldrank.recipes import RECIPES
from foldrank.recipes.families import BY_CONFIG
from foldrank.recipes.methods import Method
from foldrank.recipes.model_config import ModelConfig
from foldrank.recipes.reading import load_recipe
from foldrank.recipes.schema import Recipe
from foldrank.recipes.train_config import TrainConfig
from foldrank.train.accounting import model_memory
from foldrank.train.model import check_recipe, dense_parameters, meta_model, resolve_vocab_size
from foldrank.train.trainer import training_arguments

METHODS = ("dense", "lowrank", "lowrank-dlr", "cola", "cola-dlr")

# Size: parameters dense and low-rank, exact; the same in millions as published (None: not published).
PARAMETERS = {
    "tiny": (1_840_256, 1_362_048, None, None),
    "llama-60m": (58_073_600, 42_770_944, 58, 43),
    "llama-130m": (134_105_856, 93_997_824, 134, 94),
    "llama-350m": (367_969_280, 185_222_144, 368, 185),
    "llama-1b": (1_339_082_752, 609_310_720, 1339, 609),
    "llama-7b": (6_738_415_616, 2_820_935_680, None, None),
}

CRNET = ("crnet", "crnet-dlr")
BY_SIZE = [f"{size}-{method}" for size in PARAMETERS for method in (*METHODS, "sltrain", "sltrain-dlr", *CRNET)]
FOSL = [f"llama-{size}-{method}-fosl" for size in ("60m", "130m", "350m", "1b") for method in METHODS[1:]]

meta_model_of = cache(lambda name: meta_model(RECIPES[name]))


def test_names():
    pairs = {*BY_SIZE, *BY_CONFIG}
    assert set(RECIPES) == {"demo", *pairs, *(f"{name}-muon" for name in pairs), *FOSL}


def test_muon_changes_the_optimizer_alone():
    for name in BY_SIZE:
        plain, muon = RECIPES[name], RECIPES[f"{name}-muon"]
        assert (plain.train.optimizer, muon.train.optimizer) == ("adamw", "muon")
        assert replace(muon, train=replace(muon.train, optimizer="adamw")) == plain


@pytest.mark.parametrize(
    ("size", "steps", "warmup", "rate", "beta2"),
    [
        ("60m", 11_000, 1_100, 0.01, 0.999),
        ("130m", 22_000, 2_200, 0.005, 0.99),
        ("350m", 65_000, 6_500, 0.003, 0.99),
        ("1b", 140_000, 10_000, 0.002, 0.99),
    ],
)
def test_the_settings_of_fosl(tmp_path, size, steps, warmup, rate, beta2):
    for method in ("lowrank", "lowrank-dlr", "cola", "cola-dlr"):
        recipe, cola_settings = RECIPES[f"llama-{size}-{method}-fosl"], RECIPES[f"llama-{size}-{method}"]
        assert cola_settings.low_rank is not None
        assert recipe.low_rank == replace(cola_settings.low_rank, scale="trainable")
        arguments = training_arguments(recipe.override({"train.dtype": "float32", "train.device": "cpu"}), tmp_path)
        assert (arguments.max_steps, arguments.warmup_steps, arguments.learning_rate) == (steps, warmup, rate)
        assert (arguments.weight_decay, arguments.max_grad_norm) == (0.0, 0.5)
        assert (arguments.adam_beta1, arguments.adam_beta2) == (0.9, beta2)
        assert recipe.data.max_documents == steps * 512


# Those that train by Muon have the models of those that do not.
@pytest.mark.parametrize("name", ["demo", *BY_SIZE, *FOSL])
def test_every_recipe_builds_on_the_meta_device(name: str):
    recipe = RECIPES[name]
    model = meta_model_of(name)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    layers = low_rank_layers(model)
    converted = 0 if recipe.low_rank is None else recipe.model.num_layers - recipe.low_rank.dense_first
    assert len(layers) == 7 * converted
    assert all((layer.residual is not None) == ("-dlr" in name) or name == "demo" for layer in layers.values())


@pytest.mark.parametrize("family", PARAMETERS)
@pytest.mark.parametrize("method", METHODS)
def test_parameter_counts(family: str, method: str):
    dense, low_rank, dense_published, low_rank_published = PARAMETERS[family]
    count = count_parameters(meta_model_of(f"{family}-{method}"))
    assert count == (dense if method == "dense" else low_rank)
    published = dense_published if method == "dense" else low_rank_published
    assert published is None or round(count / 1e6) == published


@pytest.mark.parametrize("family", PARAMETERS)
def test_crnet_has_the_largest_rank_that_is_no_larger_than_low_rank(family: str):
    dense, crnet = RECIPES[f"{family}-dense"], RECIPES[f"{family}-crnet"]
    low_rank = PARAMETERS[family][1]
    assert crnet.low_rank is not None
    assert isinstance(crnet.low_rank.rank, int)
    one_more = replace(crnet, low_rank=replace(crnet.low_rank, rank=crnet.low_rank.rank + 1))
    assert count_parameters(meta_model(crnet)) <= low_rank < count_parameters(meta_model(one_more))
    assert replace(crnet, low_rank=None) == dense


def test_crnet_without_a_rank_is_one_line():
    with pytest.raises(ValueError, match="crnet has no rank for 1 blocks of rank 32: its first block alone is larger"):
        Method.parse("crnet").recipe(RECIPES["tiny-dense"].override({"model.num_layers": 1}), 32)


def test_the_dense_equivalent():
    assert dense_parameters(RECIPES["llama-60m-cola-dlr"]) == 58_073_600


@pytest.mark.parametrize("family", PARAMETERS)
def test_methods_of_a_family_differ_in_the_method_alone(family: str):
    dense, lowrank, lowrank_dlr, cola, cola_dlr = (RECIPES[f"{family}-{method}"] for method in METHODS)
    assert all(replace(recipe, low_rank=None) == dense for recipe in (lowrank, lowrank_dlr, cola, cola_dlr))
    for plain, with_dlr in ((lowrank, lowrank_dlr), (cola, cola_dlr)):
        assert plain.low_rank is not None
        assert with_dlr.low_rank is not None
        assert with_dlr.low_rank.residual is not None
        assert replace(with_dlr.low_rank, residual=None) == plain.low_rank
    assert lowrank.low_rank is not None
    assert cola.low_rank == replace(lowrank.low_rank, activation="silu")


@pytest.mark.parametrize(
    ("size", "steps", "warmup", "rank", "learning_rate"),
    [
        ("60m", 10_000, 2_000, 128, 0.006),
        ("130m", 20_000, 2_000, 256, 0.003),
        ("350m", 60_000, 6_000, 256, 0.003),
        ("1b", 100_000, 10_000, 512, 0.002),
        ("7b", 150_000, 15_000, 1024, 0.001),
    ],
)
def test_published_protocol_reaches_the_trainer(tmp_path, size, steps, warmup, rank, learning_rate):
    recipe = RECIPES[f"llama-{size}-cola"]
    assert recipe.low_rank is not None
    assert recipe.low_rank.rank == rank
    assert recipe.train.batch_size * recipe.train.sequence_length == 131_072
    assert resolve_vocab_size(recipe) == 32_000
    # bfloat16 needs an accelerator to be accepted.
    arguments = training_arguments(recipe.override({"train.dtype": "float32", "train.device": "cpu"}), tmp_path)
    assert (arguments.max_steps, arguments.warmup_steps) == (steps, warmup)
    assert arguments.learning_rate == learning_rate
    assert (arguments.weight_decay, arguments.max_grad_norm) == (0.01, 0.5)
    assert (arguments.adam_beta1, arguments.adam_beta2) == (0.9, 0.999)
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 512


@pytest.mark.parametrize("size", ["60m", "130m", "350m", "1b", "7b"])
def test_micro_batch_is_the_largest_that_leaves_a_tenth_of_80_gb(size: str):
    def largest(factor: int) -> int:
        needs = []
        # Those that need the most.
        for name in (f"llama-{size}-dense", f"llama-{size}-cola-dlr", f"llama-{size}-crnet-dlr"):
            train = RECIPES[name].train
            assert train.micro_batch_size is not None
            # Steps of more sequences, so that there are enough for each GPU.
            train = replace(train, batch_size=4096, micro_batch_size=factor * train.micro_batch_size)
            train = replace(train, sharding="fsdp" if size == "7b" else "none")
            needs.append(model_memory(meta_model_of(name), train, gpus=8).total)
        return max(needs)

    assert largest(1) <= 0.9 * 80e9 < largest(2)


@pytest.mark.parametrize("name", ["demo", "tiny-lowrank-dlr", "llama-7b-cola", "llama-60m-dense"])
def test_a_recipe_survives_its_file(tmp_path, name: str):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPES[name].to_dict()))
    assert load_recipe(str(file)).to_dict() == RECIPES[name].to_dict()


@pytest.mark.parametrize(
    ("micro_batch", "processes", "expected"),
    [(None, 1, 12), (None, 4, 3), (5, 1, 4), (12, 3, 4), (3, 2, 3), (1, 12, 1)],
)
def test_sequences_per_forward_fill_a_step_evenly(micro_batch, processes, expected):
    train = TrainConfig(batch_size=12, micro_batch_size=micro_batch)
    assert train.resolve_micro_batch_size(processes) == expected


@pytest.mark.parametrize("processes", [0, 5, 24])
def test_sequences_that_cannot_be_shared_out(processes):
    with pytest.raises(ValueError, match=f"batch_size 12 cannot be shared out evenly among {processes} processes"):
        TrainConfig(batch_size=12).resolve_micro_batch_size(processes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 0, "num_layers": -1}, "hidden_size must be at least 1, got 0; num_layers must be at least 1"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"hidden_size": 60, "num_heads": 4}, "hidden_size 60 must be a multiple of twice num_heads 4"),
        ({"num_key_value_heads": 3}, "num_heads 4 must be a multiple of num_key_value_heads 3"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_heads": 0, "num_key_value_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"head_dim": 7}, r"head_dim must be even \(rotary embedding\), got 7"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must"),
    ],
)
def test_shapes_that_are_none(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)


LLAMA_3: dict[str, Any] = {
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
}
LLAMA_3_2_1B = ModelConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_heads=32,
    head_dim=64,
    tie_embeddings=True,
    max_position_embeddings=131_072,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    **LLAMA_3,
)
LLAMA_3_8B = ModelConfig(
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    max_position_embeddings=8192,
    **LLAMA_3,
)


@pytest.mark.parametrize(
    ("shape", "parameters"), [(LLAMA_3_2_1B, 1_235_814_400), (LLAMA_3_8B, 8_030_261_248)], ids=["1B", "8B"]
)
def test_the_shapes_of_llama_3(shape: ModelConfig, parameters: int):
    dense = Recipe(model=shape)
    model: Any = meta_model(dense)
    assert count_parameters(model) == parameters == dense_parameters(dense)
    assert model.config.rope_parameters["rope_theta"] == 500_000.0
    assert model.config.rope_parameters["rope_type"] == ("llama3" if shape.rope_scaling else "default")
    for method in ("cola-dlr", "crnet-dlr"):
        low_rank = Method.parse(method).recipe(dense, 256)
        assert count_parameters(meta_model(low_rank)) < parameters
        check_recipe(low_rank)


def test_heads_and_positions_reach_the_model():
    recipe = Recipe().override(
        {
            "model.num_key_value_heads": 2,
            "model.head_dim": 24,
            "model.rms_norm_eps": 1e-5,
            "model.rope_theta": 500.0,
            "model.max_position_embeddings": 4096,
            "model.rope_scaling": {"rope_type": "linear", "factor": 2.0},
        }
    )
    config: Any = meta_model(recipe).config
    assert (config.num_key_value_heads, config.head_dim, config.rms_norm_eps) == (2, 24, 1e-5)
    assert config.max_position_embeddings == 4096
    assert config.rope_parameters == {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}


def test_a_rope_that_is_none_is_one_line():
    with pytest.raises(ValueError, match=r"model\.rope_scaling is not what transformers takes"):
        check_recipe(Recipe().override({"model.rope_scaling": {"rope_type": "spiral", "factor": 2.0}}))


def test_vocabulary_is_the_recipes_where_it_names_one():
    tokenizer = train_tokenizer(["a text to train on, a text to train on"], 262)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<never in a text>"]})
    for named, expected in ((None, 321), (350, 350), (321, 321)):
        assert resolve_vocab_size(Recipe(model=ModelConfig(vocab_size=named)), tokenizer) == expected
    with pytest.raises(ValueError, match="vocab_size 319 is too small for this tokenizer, whose tokens count 320"):
        resolve_vocab_size(Recipe(model=ModelConfig(vocab_size=319)), tokenizer)


def test_vocabulary_of_a_tokenizer_that_is_only_named():
    with pytest.raises(ValueError, match="the vocabulary of the tokenizer gpt2 is unknown before it is read"):
        resolve_vocab_size(Recipe().override({"data.tokenizer": "gpt2"}))


@pytest.mark.parametrize(
    ("size", "alpha", "rank", "density", "steps"),
    [
        ("60m", 32, 128, 0.03, 11_000),
        ("130m", 16, 256, 0.03, 22_000),
        ("350m", 16, 256, 0.03, 65_000),
        ("1b", 8, 512, 0.03, 140_000),
        ("7b", 8, 1024, 0.05, 150_000),
    ],
)
def test_sltrain_is_as_its_paper_sets_it(size: str, alpha: int, rank: int, density: float, steps: int):
    recipe = RECIPES[f"llama-{size}-sltrain"]
    assert recipe.low_rank is not None
    assert (recipe.low_rank.backbone, recipe.low_rank.rank) == ("sltrain", rank)
    assert (recipe.low_rank.scale, recipe.low_rank.extra_config) == (alpha / rank, {"density": density})
    assert (recipe.train.steps, recipe.train.warmup_ratio, recipe.train.learning_rate) == (steps, 0.1, 0.003)
    assert recipe.train.weight_decay == 0.0
    assert recipe.data.max_documents == steps * 512
