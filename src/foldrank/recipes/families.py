"""Shapes of models that are in use, dense and low-rank, by their configs: Llama 3, Qwen3, Mistral, GPT-2.

The shapes are those of the models named, as their `config.json` says; the tokenizer is theirs, from the hub. Everything
else is ours and untuned: C4 in packed sequences, as many tokens a step as in the protocol of `llama.py`, steps, rates
and warm-up of the size there that is nearest, ranks of a quarter of the width as at its 60M and 7B, and no dropout.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from foldrank.recipes.llama import LLAMA
from foldrank.recipes.methods import METHODS
from foldrank.recipes.model_config import ModelConfig
from foldrank.recipes.schema import Recipe

METHODS_HERE = tuple(method for method in METHODS if method.backbone in ("dense", "lowrank", "cola"))
"""The methods of which there are recipes: the other backbones come with settings that are known for Llama alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A model's config, and what of its training depends on it."""

    config: Mapping[str, Any]
    tokenizer: str
    sequence_length: int
    nearest: str
    """The size of the protocol whose steps and rates are taken."""


def _llama3(**sizes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 128_256,
        "num_key_value_heads": 8,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-5,
        **sizes,
    }


SHAPES = {
    "llama3-1b": Shape(
        config=_llama3(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            head_dim=64,
            max_position_embeddings=131_072,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            tie_word_embeddings=True,
        ),
        tokenizer="meta-llama/Llama-3.2-1B",
        sequence_length=2048,
        nearest="1b",
    ),
    "llama3-8b": Shape(
        config=_llama3(
            hidden_size=4096,
            intermediate_size=14_336,
            num_hidden_layers=32,
            head_dim=128,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            tie_word_embeddings=False,
        ),
        tokenizer="meta-llama/Meta-Llama-3-8B",
        sequence_length=2048,
        nearest="7b",
    ),
    "qwen3-0.6b": Shape(
        config={
            "model_type": "qwen3",
            "vocab_size": 151_936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40_960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
        },
        tokenizer="Qwen/Qwen3-0.6B",
        sequence_length=2048,
        nearest="1b",
    ),
    "mistral-7b": Shape(
        config={
            "model_type": "mistral",
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32_768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
        },
        tokenizer="mistralai/Mistral-7B-v0.1",
        sequence_length=2048,
        nearest="7b",
    ),
    "gpt2-124m": Shape(
        config={
            "model_type": "gpt2",
            "vocab_size": 50_257,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_positions": 1024,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "tie_word_embeddings": True,
        },
        tokenizer="openai-community/gpt2",
        sequence_length=1024,
        nearest="130m",
    ),
}


def dense(shape: Shape) -> Recipe:
    """The dense model of a shape."""
    protocol = LLAMA[f"llama-{shape.nearest}-dense"]
    tokens = protocol.train.batch_size * protocol.train.sequence_length
    return replace(
        protocol,
        model=ModelConfig(config=shape.config),
        data=replace(protocol.data, tokenizer=shape.tokenizer, max_documents=None),
        train=replace(
            protocol.train,
            sequence_length=shape.sequence_length,
            batch_size=tokens // shape.sequence_length,
            micro_batch_size=None,
            layout="packed",
        ),
    )


BY_CONFIG: dict[str, Recipe] = {
    f"{name}-{method}": method.recipe(recipe, recipe.model.hidden_size // 4)
    for name, recipe in ((name, dense(shape)) for name, shape in SHAPES.items())
    for method in METHODS_HERE
}
