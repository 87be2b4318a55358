"""Shipped recipes that a budget pays for: what each would cost, by the plan; nothing is said of losses.

budget -> shipped shapes, dense and low-rank -> those within it -> tokens, FLOPs, hours, memory of each
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from foldrank.core.inventory import count_parameters
from foldrank.recipes.families import METHODS_HERE, SHAPES
from foldrank.recipes.llama import SIZES
from foldrank.recipes.published import PUBLISHED, Published
from foldrank.recipes.reading import load_recipe
from foldrank.recipes.schema import Recipe
from foldrank.recipes.shipped import RECIPES
from foldrank.recipes.train_config import Checkpointing
from foldrank.train.accounting import evaluation_memory, memory, training_flops
from foldrank.train.activation_checkpointing import without_latents
from foldrank.train.device_memory import ROOM, fit
from foldrank.train.model import dense_parameters, shape_of
from foldrank.train.optimizer_cost import optimizer_flops
from foldrank.train.stand_ins import total

SMALLEST = 0.5
"""Of the parameters asked for: smaller models are no candidates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What there is; None: not limited by that.

    Raises:
        ValueError: where nothing is limited, or hours without GPUs are.
    """

    parameters: int | None = None
    """Of the model that is deployed, at most."""
    tokens: int | None = None
    """To train on; None: as many as the FLOPs pay for, or as the recipe says."""
    flops: float | None = None
    """Of the whole training."""
    hours: float | None = None
    """Of the whole training, on all GPUs together."""
    gpus: int = 1
    flops_per_second: float | None = None
    """That one GPU gives in training: its peak times the utilization."""
    gpu_memory: float | None = None
    """Bytes of one GPU."""

    def __post_init__(self) -> None:
        if all(limit is None for limit in (self.parameters, self.tokens, self.flops, self.hours)):
            raise ValueError("give a budget: parameters, tokens, FLOPs, or hours on GPUs")
        if self.hours is not None and self.flops_per_second is None:
            raise ValueError("hours say nothing without the GPU that they are of")

    @property
    def most_flops(self) -> float | None:
        """The least of what FLOPs and hours allow."""
        paid = None if self.hours is None else self.hours * 3600 * self.gpus * (self.flops_per_second or 0)
        return min((limit for limit in (self.flops, paid) if limit is not None), default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A recipe within a budget, and its cost."""

    recipe: str
    settings: dict[str, Any]
    """Replaced in the recipe: steps, a rank of its own, and what lets it fit a GPU."""
    rank: int | None
    """None of a dense model."""
    parameters: int
    dense_parameters: int
    tokens: int
    flops_per_token: int
    """Of the passes, what is computed again included."""
    flops: float
    """Of the whole training, the optimizer's included."""
    hours: float | None
    """None without a GPU."""
    bytes_per_gpu: int | None
    """At the peak of a step or an evaluation, one model on each GPU; None without a GPU."""
    optimizer: str
    learning_rate: float
    published: Published | None
    """What a paper prints for the recipe as it is, which is not this run unless its tokens are the same."""

    @property
    def tokens_per_parameter(self) -> float:
        """Of the deployed model."""
        return self.tokens / self.parameters


def candidates(budget: Budget, *, ranks: Sequence[float] = (), optimizer: str = "adamw") -> list[Candidate]:
    """The shipped recipes within a budget, the largest first.

    A recipe with DLR is not named beside the one without: its cost is the same.

    Args:
        budget: what there is.
        ranks: shares of the width to take as ranks of low-rank layers too, such as 0.125, where no layer is narrower.
        optimizer: adamw or muon.

    Raises:
        ValueError: where none is within the budget.
    """
    found = [candidate for asked in _recipes(ranks, optimizer) if (candidate := _candidate(*asked, budget))]
    if not found:
        raise ValueError(
            "no shape that ships is within this budget (and fits the GPU, where one is named): allow more parameters, "
            "FLOPs or hours, or fewer tokens; foldrank plan tells the cost of a shape of your own"
        )
    return sorted(found, key=lambda candidate: (-candidate.parameters, candidate.recipe))


def _recipes(ranks: Sequence[float], optimizer: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of recipes, each with a rank that is not its own, or none."""
    methods = {
        **{f"llama-{size}": ("dense", "lowrank", "cola", "sltrain", "crnet") for size in SIZES},
        **{shape: tuple(str(method) for method in METHODS_HERE if not method.residual) for shape in SHAPES},
        "tiny": ("dense", "lowrank", "cola"),
    }
    for name in (f"{shape}-{method}" for shape, names in methods.items() for method in names):
        full = name if optimizer == "adamw" else f"{name}-{optimizer}"
        yield full, {}
        recipe = RECIPES[full]
        if recipe.low_rank is not None and recipe.low_rank.backbone == "lowrank":
            asked = {max(1, round(share * recipe.model.hidden_size)) for share in ranks}
            possible = (rank for rank in sorted(asked) if rank <= recipe.model.key_value_width)
            yield from ((full, {"low_rank.rank": rank}) for rank in possible if rank != recipe.low_rank.rank)


def _candidate(name: str, settings: dict[str, Any], budget: Budget) -> Candidate | None:
    recipe = load_recipe(name, settings)
    published = None if settings else PUBLISHED.get(name)
    parameters = total(shape_of(recipe), count_parameters)
    most, train = budget.parameters, recipe.train
    if (most is not None and not SMALLEST * most <= parameters <= most) or train.batch_size % budget.gpus:
        return None
    used = None
    if budget.gpu_memory is not None:
        if (found := _fit(recipe, budget.gpu_memory, budget.gpus)) is None:
            return None
        fitting, used = found
        settings = {**settings, **fitting}
        recipe = load_recipe(name, settings)
    tokens_per_step = train.batch_size * train.sequence_length
    per_token = training_flops(recipe, gpus=budget.gpus).total
    # Each GPU does all of the optimizer.
    per_step = per_token * tokens_per_step + budget.gpus * optimizer_flops(shape_of(recipe), train)
    steps = train.steps
    if budget.tokens is not None:
        steps = budget.tokens // tokens_per_step
    elif budget.most_flops is not None:
        steps = int(budget.most_flops // per_step)
    flops = per_step * steps
    if steps < 1 or (budget.most_flops is not None and flops > budget.most_flops):
        return None
    speed, low_rank = budget.flops_per_second, recipe.low_rank
    return Candidate(
        recipe=name,
        settings={"train.steps": steps, **settings},
        rank=low_rank.rank if low_rank is not None and isinstance(low_rank.rank, int) else None,
        parameters=parameters,
        dense_parameters=dense_parameters(recipe),
        tokens=steps * tokens_per_step,
        flops_per_token=per_token,
        flops=flops,
        hours=None if speed is None else flops / (budget.gpus * speed) / 3600,
        bytes_per_gpu=used,
        optimizer=train.optimizer,
        learning_rate=train.learning_rate,
        published=published,
    )


def _fit(recipe: Recipe, gpu_memory: float, gpus: int) -> tuple[dict[str, Any], int] | None:
    """The first settings with which a step fits, recomputing nothing, all but latents, or all; and its bytes."""
    limit = int(ROOM["cuda"] * gpu_memory)
    ways: list[Checkpointing | None] = [None, "block"]
    if not without_latents(shape_of(recipe)):
        ways.insert(1, "latents")
    for way in ways:
        settings = {"train.dtype": "bfloat16", "train.activation_checkpointing": way, "train.micro_batch_size": None}
        fitted = fit(recipe.override(settings), limit, processes=gpus)
        used = max(memory(fitted, gpus=gpus).total, evaluation_memory(fitted, gpus=gpus))
        if used <= limit:
            settings["train.micro_batch_size"] = fitted.train.resolve_micro_batch_size(gpus)
            settings["train.chunked_loss"] = bool(fitted.train.chunked_loss)
            return settings, used
    return None
