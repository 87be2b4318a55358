"""Shapes of many equal blocks with one block that stands for them, so that a plan takes no longer for more blocks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from foldrank.recipes.schema import Recipe

_STANDS_FOR = "_stands_for"


def with_fewer_blocks(recipe: Recipe) -> tuple[Recipe, int]:
    """The recipe with one block in place of those that its settings make equal, and the position of that block."""
    low_rank, count = recipe.low_rank, recipe.model.num_layers
    first, last = (0, 0) if low_rank is None else (low_rank.dense_first, low_rank.dense_last)
    if low_rank is not None:
        alpha = None if low_rank.residual is None else low_rank.residual.alpha
        tables = (low_rank.budget, low_rank.targets, low_rank.exclude or None)
        by_name = not isinstance(low_rank.rank, int | float) or not isinstance(alpha, int | float | None)
        if by_name or any(table is not None for table in tables):
            return recipe, 0
    if first + last >= count:
        return recipe, 0
    return replace(recipe, model=recipe.model.with_layers(first + 1 + last)), first


def stand_in_(block: nn.Module, times: int) -> None:
    """Lets a block stand for so many equal ones, itself among them."""
    setattr(block, _STANDS_FOR, times)


def stands_for(block: nn.Module) -> int:
    """How many blocks a block stands for: 1 of an ordinary model."""
    return getattr(block, _STANDS_FOR, 1)


def blocks_of(model: nn.Module) -> list[Any]:
    """The blocks of a model of transformers, which families call `layers` or `h`."""
    base: Any = model.base_model
    return list(base.layers if hasattr(base, "layers") else base.h)


def total(model: nn.Module, count: Callable[[Any], int]) -> int:
    """What `count` would give for the whole model, if it adds up over modules."""
    return count(model) + sum((stands_for(block) - 1) * count(block) for block in blocks_of(model))


def times_of(model: nn.Module) -> dict[int, int]:
    """From the id of a parameter to the number of equal ones that it stands for, where that is not 1."""
    return {
        id(parameter): stands_for(block)
        for block in blocks_of(model)
        if stands_for(block) > 1
        for parameter in block.parameters()
    }
