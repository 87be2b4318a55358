"""What a method of a study costs, from its runs and settings, and how far its training can move a weight."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from foldrank.compare.learning_rate_sweep import usable
from foldrank.compare.records import Record
from foldrank.compare.study import Study
from foldrank.recipes.schema import Recipe
from foldrank.train.schedule import sum_of_rates


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What a method costs, from its runs."""

    rank: str | None
    parameters: int
    parameters_blocks: int | None
    """Of attention and MLP layers; the others are those of embedding, head and norms."""
    parameters_fraction: float
    """Of the study's dense model of this size."""
    flops_per_token: int
    """Training, forward and backward, from shapes."""
    memory: Mapping[str, int]
    """Bytes by part on one device, from shapes."""
    tokens: float | None
    """Trained on, in one final run."""
    tokens_per_parameter: float | None
    flops: float | None
    """Of one final run."""
    movement: float | None
    """How far training can move a weight, in entries of the residual (see `movement`); None while no rate is chosen."""
    tokens_per_second: float | None
    """Median over the final runs."""
    records: tuple[str, ...]


def costs_of(recipe: Recipe, runs: Sequence[Record], dense: int | None) -> Costs | None:
    """The costs of a method; None without a run.

    Args:
        recipe: of its final runs.
        runs: runs of it that finished, the final ones where there are any.
        dense: parameters of the study's dense model of this size.
    """
    if not runs:
        return None
    first = runs[0].measured
    final_metrics = [run.measured for run in runs if run.stage == "final"]
    rank = None if recipe.low_rank is None else runs[0].recipe["low_rank"]["rank"]
    tokens = final_metrics[0].tokens if final_metrics else None
    return Costs(
        rank=None if rank is None else str(rank),
        parameters=first.params,
        parameters_blocks=first.params_blocks,
        parameters_fraction=first.params / (dense or first.params_dense),
        flops_per_token=first.flops_per_token,
        memory=first.memory_bytes,
        tokens=tokens,
        tokens_per_parameter=None if tokens is None else tokens / first.params,
        flops=final_metrics[0].flops if final_metrics else None,
        movement=movement(recipe) if final_metrics else None,
        tokens_per_second=median(run.tokens_per_second for run in final_metrics) if final_metrics else None,
        records=tuple(run.id for run in runs),
    )


def dense_parameters(study: Study, records: Mapping[str, Record], corpus: str, size: str) -> int | None:
    """Parameters of the dense model of a size; a method may have another shape."""
    own_shape = {m.name for m in study.methods if any(name.startswith("model.") for name in m.settings)}
    for run in records.values():
        if (run.corpus, run.size) == (corpus, size) and usable(run) and run.method not in own_shape:
            return run.measured.params_dense
    return None


def movement(recipe: Recipe) -> float | None:
    """The sum of a run's learning rates over an entry of c R; without a residual, over what alpha 1 would give.

    No step of AdamW or Muon is much larger than its learning rate. Where the ratio is near 1, an up-projection cannot
    leave a start to which the residual was added: training is nearly frozen there.

    Returns:
        The ratio; None of a dense model, and where layers differ in rank or alpha.
    """
    if recipe.low_rank is None:
        return None
    train, residual, rank = recipe.train, recipe.low_rank.residual, recipe.low_rank.rank
    alpha = 1.0 if residual is None else residual.alpha
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or not alpha:
        return None
    corrected = residual is None or residual.variance_correction
    copies = math.ceil(recipe.model.hidden_size / rank) if corrected else 1
    return sum_of_rates(train) * math.sqrt(copies) / abs(alpha)
