"""The model that a recipe describes."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldrank.core.anchored_decay import check_foldable_at_start
from foldrank.core.inventory import count_parameters
from foldrank.data.config import DataConfig
from foldrank.hf.tokenizers import embedding_size, largest_id
from foldrank.optim.factor_optimizer import parameters_by_rule
from foldrank.recipes.schema import Recipe
from foldrank.recipes.train_config import TrainConfig
from foldrank.structured import parse_json, to_json
from foldrank.train.ablations import check_ablation
from foldrank.train.activation_checkpointing import checkpoint_activations_, without_latents
from foldrank.train.architecture import causal_class, check_architecture, config_of
from foldrank.train.chunked_loss import chunk_loss_
from foldrank.train.sharding import check_spread
from foldrank.train.stand_ins import blocks_of, stand_in_, total, with_fewer_blocks
from foldrank.train.start import start_


def build_model(
    recipe: Recipe,
    vocab_size: int,
    *,
    device: torch.device | str = "cpu",
    place: Callable[[nn.Module], object] | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> PreTrainedModel:
    """The recipe's model with fresh weights, float32; with one seed, layers that are not low-rank start equal.

    What it keeps for the backward pass is as the recipe says (`activation_checkpointing`). The start is the same on
    every device, and however it is shared out (train/start.py).

    Raises:
        ValueError: where the low-rank settings do not fit the architecture, or latents are to be kept and there are
            none.
    """
    with torch.device("meta"):
        model = _build(recipe, vocab_size, bos_token_id=bos_token_id, eos_token_id=eos_token_id)
    start_(model, recipe.seed, device, place=place)
    if recipe.train.chunked_loss:
        chunk_loss_(model)
    checkpoint_activations_(model, recipe.train.activation_checkpointing)
    return model


def check_recipe(recipe: Recipe) -> None:
    """Refuses a recipe whose parts do not fit together, before any data is read; nothing is allocated.

    Raises:
        ValueError: saying what does not fit.
    """
    # The vocabulary matters to none of this.
    check_architecture(recipe)
    model = shape_of(recipe, recipe.nominal_vocab_size)
    if recipe.train.activation_checkpointing == "latents" and (why := without_latents(model)):
        raise ValueError(why)
    if recipe.train.fold_at_start:
        check_foldable_at_start(model)
    parameters_by_rule(model, recipe.train.optimizer)  # refuses an optimizer that does not fit the layers
    if recipe.train.ablation is not None:
        check_ablation(model)
    check_spread(model, recipe.train)
    recipe.train.resolve_micro_batch_size()


def resolve_vocab_size(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None) -> int:
    """Entries of the recipe's embedding; before any data is read, without a tokenizer.

    Raises:
        ValueError: where the recipe names too few for the tokenizer, or without one does not tell.
    """
    named = recipe.model.vocab_size
    if tokenizer is None:
        if named is None and recipe.data.tokenizer is not None:
            raise ValueError(
                f"the vocabulary of the tokenizer {recipe.data.tokenizer} is unknown before it is read: give its size "
                "with --model.vocab_size"
            )
        return recipe.nominal_vocab_size
    needed = embedding_size(tokenizer)
    if named is not None and named < needed:
        raise ValueError(f"model.vocab_size {named} is too small for this tokenizer, whose tokens count {needed}")
    return named or largest_id(tokenizer) + 1


def meta_model(recipe: Recipe, vocab_size: int | None = None) -> PreTrainedModel:
    """The recipe's model on the meta device: its shapes, nothing allocated.

    Args:
        recipe: all settings.
        vocab_size: entries of the embedding; None: `resolve_vocab_size(recipe)`.

    Raises:
        ValueError: as `build_model` and `vocabulary`.
    """
    with torch.device("meta"):
        return _build(recipe, vocab_size or resolve_vocab_size(recipe))


def shape_of(recipe: Recipe, vocab_size: int | None = None) -> PreTrainedModel:
    """`meta_model` with one block for many equal ones (stand_ins.py), made once for recipes of one shape: to be read,
    not changed, and counted by `total`.
    """
    vocab_size = vocab_size or resolve_vocab_size(recipe)
    shape = replace(recipe, data=DataConfig(), train=TrainConfig(sequence_length=recipe.train.sequence_length))
    return _shape(to_json(shape.to_dict()), vocab_size)


def trained_shape(recipe: Recipe, vocab_size: int | None = None) -> PreTrainedModel:
    """`shape_of` what takes the steps: without residuals, where these are folded at the start."""
    if recipe.train.fold_at_start and recipe.low_rank is not None:
        recipe = replace(recipe, low_rank=replace(recipe.low_rank, residual=None))
    return shape_of(recipe, vocab_size)


@lru_cache(maxsize=4)
def _shape(recipe: str, vocab_size: int) -> PreTrainedModel:
    whole = Recipe.from_dict(parse_json(recipe))
    fewer, position = with_fewer_blocks(whole)
    model = meta_model(fewer, vocab_size)
    stand_in_(blocks_of(model)[position], 1 + whole.model.num_layers - fewer.model.num_layers)
    return model


def dense_parameters(recipe: Recipe, vocab_size: int | None = None) -> int:
    """Parameters of the dense model of the same shape; nothing is allocated."""
    return total(shape_of(replace(recipe, low_rank=None), vocab_size), count_parameters)


def _build(recipe: Recipe, vocab_size: int, **special_tokens: Any) -> PreTrainedModel:
    return causal_class(recipe)(config_of(recipe, vocab_size, **special_tokens))
