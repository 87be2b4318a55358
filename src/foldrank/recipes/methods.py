"""What the name of a method means, parsed once, and how a dense recipe becomes one of it.

A further method is one row of BACKBONE_RECIPES.
"""

import difflib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

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


def crnet(dense: Recipe, rank: int) -> Recipe:
    """CR-Net (arXiv 2509.18993), Y_l = g Y_(l-1) + B A X_l: the first block dense, the others of the largest rank with
    which the model is no larger than plain low rank of this one.

    Raises:
        ValueError: where the first block alone is larger.
    """
    d, f, others = dense.model.hidden_size, dense.model.intermediate_size, dense.model.num_layers - 1
    q, kv = dense.model.query_width, dense.model.key_value_width
    block, per_rank, gains = 2 * d * (q + kv) + 3 * d * f, 2 * (d + q) + 2 * (d + kv) + 3 * (d + f), 7
    equal = ((others + 1) * rank * per_rank - block - others * gains) // (others * per_rank) if others else 0
    if equal < 1:
        raise ValueError(f"crnet has no rank for {others + 1} blocks of rank {rank}: its first block alone is larger")
    return replace(dense, low_rank=LowRankConfig(rank=equal, backbone="crnet", dense_first=1))


BACKBONE_RECIPES: dict[str, Callable[[Recipe, int], Recipe]] = {
    "lowrank": lowrank,
    "cola": cola,
    "sltrain": sltrain,
    "crnet": crnet,
}
"""From the name of a low-rank backbone to what makes the dense recipe, with a rank, one on it."""


def with_dlr(recipe: Recipe) -> Recipe:
    """The same with the residual on every low-rank layer: alpha 1, fixed, over sqrt(K) (arXiv 2606.28932)."""
    assert recipe.low_rank is not None
    return replace(recipe, low_rank=replace(recipe.low_rank, residual=ResidualConfig()))


def by_muon(recipe: Recipe) -> Recipe:
    """The same trained by Muon, at the same learning rate: its updates are as large as AdamW's (foldrank.optim)."""
    return replace(recipe, train=replace(recipe.train, optimizer="muon"))


DENSE = "dense"


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """What a method's name says: `cola-dlr-folded` is CoLA's backbone with the residual, in the variant `folded`."""

    backbone: str
    """dense, or a key of BACKBONE_RECIPES."""

    residual: bool = False
    """Whether it trains with DLR."""

    variants: tuple[str, ...] = ()
    """Other ways to compute the same, in the order in which the name has them; a benchmark says what they are."""

    def __str__(self) -> str:
        return "-".join((self.backbone, *(("dlr",) if self.residual else ()), *self.variants))

    @classmethod
    def parse(cls, name: str, variants: Collection[str] = ()) -> "Method":
        """The method called `name`, which may end in some of `variants`.

        Raises:
            ValueError: where there is none, naming the nearest.
        """
        rest, suffixes = name, []
        while last := next((variant for variant in variants if rest.endswith(f"-{variant}")), None):
            rest = rest.removesuffix(f"-{last}")
            suffixes.insert(0, last)
        for method in METHODS:
            if str(method) == rest:
                return replace(method, variants=tuple(suffixes))
        near = ", ".join(difflib.get_close_matches(rest, map(str, METHODS), n=3, cutoff=0))
        raise ValueError(f"no method is called {name!r}; the nearest are {near}")

    @property
    def plain(self) -> "Method":
        """The same without its variants."""
        return replace(self, variants=())

    def without(self, variant: str) -> "Method":
        """The same without one variant."""
        return replace(self, variants=tuple(name for name in self.variants if name != variant))

    def without_residual(self) -> "Method":
        """The same backbone without DLR."""
        return replace(self, residual=False)

    def recipe(self, dense: Recipe, rank: int) -> Recipe:
        """The recipe of this method, made of the dense one. Methods differ in nothing else."""
        if self.backbone == DENSE:
            return dense
        recipe = BACKBONE_RECIPES[self.backbone](dense, rank)
        return with_dlr(recipe) if self.residual else recipe


METHODS = (
    Method(backbone=DENSE),
    *(Method(backbone=backbone, residual=residual) for backbone in BACKBONE_RECIPES for residual in (False, True)),
)
"""All methods: dense, and each low-rank backbone without and with DLR."""


def family(name: str, dense: Recipe, rank: int) -> dict[str, Recipe]:
    """The recipe of every method, by name."""
    return {f"{name}-{method}": method.recipe(dense, rank) for method in METHODS}
