"""A recipe's architecture in the terms of transformers: the class of its family, and that class's config."""

from dataclasses import replace
from typing import Any

import torch
from transformers import CONFIG_MAPPING, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from foldrank.hf.families import LOW_RANK_CLASSES
from foldrank.hf.foreign import foreign
from foldrank.hf.remote_code import FAMILIES
from foldrank.recipes.schema import Recipe

PAGE = "docs/architectures.md"
"""Where it says how a family gets its low-rank classes."""


def causal_class(recipe: Recipe) -> type[PreTrainedModel]:
    """The language model of the recipe's family: its low-rank class, or the dense one of transformers.

    Raises:
        ValueError: for a family without low-rank classes.
    """
    dense = LlamaForCausalLM if recipe.model.config is None else _family(_fields(recipe)["model_type"])
    return dense if recipe.low_rank is None else LOW_RANK_CLASSES[dense]


def dense_config(recipe: Recipe) -> Any:
    """The config of the recipe's dense model, but for its vocabulary.

    Raises:
        ValueError: saying what transformers does not take.
    """
    return config_of(replace(recipe, low_rank=None), recipe.nominal_vocab_size)


def config_of(recipe: Recipe, vocab_size: int, **special_tokens: Any) -> Any:
    """The config of `causal_class(recipe)`.

    Raises:
        ValueError: saying what transformers does not take.
    """
    causal: Any = causal_class(recipe)
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **special_tokens}
    given = {**_fields(recipe), **tokens, "vocab_size": vocab_size}
    given.pop("model_type", None)
    if recipe.low_rank is not None:
        given["low_rank"] = recipe.low_rank.to_dict()
    with foreign("model.config is not what transformers takes"):
        return causal.config_class(**given)


def check_architecture(recipe: Recipe) -> None:
    """Refuses an architecture with which a pass would fail, or that is made for shorter sequences.

    Raises:
        ValueError: saying what does not fit.
    """
    config = dense_config(recipe)
    if getattr(config, "rope_parameters", None):
        with foreign("model.rope_scaling is not what transformers takes"):
            LlamaRotaryEmbedding(config)
    positions, length = config.max_position_embeddings, recipe.train.sequence_length
    if length > positions:
        raise ValueError(
            f"train.sequence_length {length} is more than the {positions} positions that the model is made for: raise "
            "its max_position_embeddings, or take shorter sequences"
        )
    if recipe.model.config is None:
        return
    # Sizes that go together are the family's affair: a pass without numbers tells.
    few = replace(recipe, low_rank=None, model=recipe.model.with_layers(1))
    with foreign("model.config: its sizes do not go together"), torch.device("meta"):
        model = causal_class(few)(config_of(few, 8))
        # With a mask that is ready: transformers makes others from numbers.
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), attention_mask=torch.zeros(1, 1, 2, 2), use_cache=False)


def _family(model_type: str) -> type[PreTrainedModel]:
    families = {family.config.model_type: family.causal for family in FAMILIES.values()}
    if model_type not in families:
        known = "it has no low-rank classes" if model_type in CONFIG_MAPPING else "transformers has no such family"
        raise ValueError(
            f"model.config is of the family {model_type!r}: {known}; those that have are {', '.join(sorted(families))}"
            f", and {PAGE} says how another gets them"
        )
    return families[model_type]


def _fields(recipe: Recipe) -> dict[str, Any]:
    model = recipe.model
    if model.config is not None:
        assert not isinstance(model.config, str)
        return dict(model.config)
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_key_value_heads or model.num_heads,
        "head_dim": model.query_width // model.num_heads,
        "rope_parameters": {"rope_theta": model.rope_theta, **(model.rope_scaling or {"rope_type": "default"})},
        "max_position_embeddings": model.max_position_embeddings or recipe.train.sequence_length,
        "rms_norm_eps": model.rms_norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
    }
