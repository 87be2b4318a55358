"""How a dense recipe becomes one of each method. A further method is one row of METHODS."""

from collections.abc import Callable
from dataclasses import replace

from foldrank.core.config import LowRankConfig, ResidualConfig
from foldrank.recipes.schema import Recipe


def lowrank(dense: Recipe, rank: int) -> Recipe:
    """Plain low rank, y = B A x, of the same rank in every attention and MLP layer."""
    return replace(dense, low_rank=LowRankConfig(rank=rank))


def cola(dense: Recipe, rank: int) -> Recipe:
    """CoLA, y = B SiLU(A x)."""
    return replace(dense, low_rank=LowRankConfig(rank=rank, activation="silu"))


def sltrain(dense: Recipe, rank: int) -> Recipe:
    """SLTrain (arXiv 2406.02214), y = (a / r) B A x + S x, with its rate, warm-up and no decay; a is 16, S 3 % full."""
    return replace(
        dense,
        low_rank=LowRankConfig(rank=rank, backbone="sltrain", scale=16 / rank),
        train=replace(dense.train, learning_rate=0.003, warmup_ratio=0.1, weight_decay=0.0),
    )


METHODS: dict[str, Callable[[Recipe, int], Recipe]] = {
    "lowrank": lowrank,
    "cola": cola,
    "sltrain": sltrain,
}
"""From a low-rank method's name to what makes the dense recipe, with a rank, one of it."""


def with_dlr(recipe: Recipe) -> Recipe:
    """The same with the residual on every low-rank layer: alpha 1, fixed, over sqrt(K) (arXiv 2606.28932)."""
    assert recipe.low_rank is not None
    return replace(recipe, low_rank=replace(recipe.low_rank, residual=ResidualConfig()))


DENSE, DLR = "dense", "-dlr"
KINDS = (DENSE, *(name + ending for name in METHODS for ending in ("", DLR)))
"""All methods by name: dense, and each low-rank one without and with DLR."""


def derived(kind: str, dense: Recipe, rank: int) -> Recipe:
    """The recipe of a method in `KINDS`, made of the dense one. Methods differ in nothing else."""
    if kind == DENSE:
        return dense
    recipe = METHODS[kind.removesuffix(DLR)](dense, rank)
    return with_dlr(recipe) if kind.endswith(DLR) else recipe


def family(name: str, dense: Recipe, rank: int) -> dict[str, Recipe]:
    """The recipe of every method, by name."""
    return {f"{name}-{kind}": derived(kind, dense, rank) for kind in KINDS}
