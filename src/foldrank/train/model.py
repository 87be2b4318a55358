"""The model that a recipe describes."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from foldrank.hf import LowRankLlamaConfig, LowRankLlamaForCausalLM
from foldrank.train.recipe import Recipe
from foldrank.tree import count_parameters


def build_model(
    recipe: Recipe, vocab_size: int, *, bos_token_id: int | None = None, eos_token_id: int | None = None
) -> PreTrainedModel:
    """The recipe's model with fresh weights, float32; with one seed, layers that are not low-rank start equal.

    Raises:
        ValueError: where the low-rank settings do not fit the architecture.
    """
    set_seed(recipe.seed)
    architecture = _architecture(recipe, vocab_size)
    architecture.update(bos_token_id=bos_token_id, eos_token_id=eos_token_id)
    if recipe.low_rank is None:
        return LlamaForCausalLM(LlamaConfig(**architecture))
    return LowRankLlamaForCausalLM(LowRankLlamaConfig(**architecture, low_rank=recipe.low_rank.to_dict()))


def dense_parameters(recipe: Recipe, vocab_size: int) -> int:
    """Parameters of the dense model of the same shape; nothing is allocated."""
    with torch.device("meta"):
        return count_parameters(LlamaForCausalLM(LlamaConfig(**_architecture(recipe, vocab_size))))


def _architecture(recipe: Recipe, vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": recipe.model.hidden_size,
        "intermediate_size": recipe.model.intermediate_size,
        "num_hidden_layers": recipe.model.num_layers,
        "num_attention_heads": recipe.model.num_heads,
        "max_position_embeddings": max(2048, recipe.train.sequence_length),
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": recipe.model.tie_embeddings,
        "pad_token_id": None,
    }
