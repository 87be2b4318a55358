"""The learning rate along a run, and from which of its steps a run can go on to another end.

    cosine     linear warm-up, half a cosine down to the last step: every rate depends on where the run ends
    wsd        warm-up, stable, decay: the rate stays at its peak until the last `decay_ratio` of the steps, in which it
               falls as 1 - sqrt (arXiv 2405.18392). One long run has many ends: each branches off a stable step
    constant   warm-up, then the peak

The shapes are those of transformers' schedulers.
"""

from dataclasses import replace
from typing import Any

from foldrank.recipes.train_config import TrainConfig

GOES_ON = (
    *("steps", "schedule", "decay_ratio", "warmup_steps", "warmup_ratio"),
    *("eval_every", "save_every", "log_every", "keep_checkpoints", "report_to"),
)
"""What may be another in a run that goes on to another end: settings of `train`."""

AT_ANY_TIME = ("skip_nonfinite", "patience")
"""What may be another whenever a run goes on, as it changes nothing of what was: settings of `train`."""

SPREAD = ("sharding", "tensor_parallel", "split_stream")
"""How a model is spread over processes: may be another where it was spread and will be, as checkpoints are the same."""


def with_settings_of(train: TrainConfig, other: TrainConfig) -> TrainConfig:
    """The settings with those of another that may be changed at any time."""
    names = (*AT_ANY_TIME, *(SPREAD if train.spreads and other.spreads else ()))
    return replace(train, **{name: getattr(other, name) for name in names})


def warmup_steps(train: TrainConfig) -> int:
    """Steps of linear warm-up."""
    return train.warmup_steps if train.warmup_steps is not None else round(train.warmup_ratio * train.steps)


def decay_steps(train: TrainConfig) -> int:
    """Steps at the end in which `wsd` decays."""
    return max(1, round(train.decay_ratio * train.steps))


def stable_until(train: TrainConfig) -> int:
    """The last step whose rate, as all before it, does not depend on where the run ends; 0 for cosine."""
    match train.schedule:
        case "cosine":
            return 0
        case "wsd":
            return train.steps - decay_steps(train)
        case "constant":
            return train.steps


def scheduler_arguments(train: TrainConfig) -> dict[str, Any]:
    """The schedule in the terms of `TrainingArguments`."""
    kind, settings = {
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": train.min_learning_rate_ratio}),
        "wsd": (
            "warmup_stable_decay",
            {
                "num_decay_steps": decay_steps(train),
                "decay_type": "1-sqrt",
                "min_lr_ratio": train.min_learning_rate_ratio,
            },
        ),
        "constant": ("constant_with_warmup", {}),
    }[train.schedule]
    return {"lr_scheduler_type": kind, "lr_scheduler_kwargs": settings, "warmup_steps": warmup_steps(train)}


def sum_of_rates(train: TrainConfig) -> float:
    """The sum of the learning rates of all steps, but for half a step at either end."""
    warmup, least = warmup_steps(train), train.min_learning_rate_ratio
    match train.schedule:
        case "cosine":
            sum_of_shares = warmup / 2 + (train.steps - warmup) * (1 + least) / 2
        case "wsd":
            decay = decay_steps(train)
            sum_of_shares = warmup * (1 + least) / 2 + (train.steps - warmup - decay) + decay * (1 + 2 * least) / 3
        case "constant":
            sum_of_shares = warmup / 2 + (train.steps - warmup)
    return train.learning_rate * sum_of_shares


def last_shared_step(then: TrainConfig, now: TrainConfig) -> int:
    """The last step from which a run of one schedule can go on with the other.

    Raises:
        ValueError: saying why there is none.
    """
    if "cosine" in (then.schedule, now.schedule):
        raise ValueError(
            "with train.schedule cosine every learning rate depends on train.steps, so a run cannot go on to another "
            "end: train with wsd or constant, or begin a new run from its weights (--init-from)"
        )
    if warmup_steps(now) != warmup_steps(then):
        raise ValueError(
            f"the run has warmed up for {warmup_steps(then)} steps: give that number as --train.warmup_steps"
        )
    return min(stable_until(then), stable_until(now))


def longer(then: TrainConfig, now: TrainConfig, step: int) -> str:
    """What going on to another end from a step means, in a sentence."""
    return (
        f"planned for {then.steps:,} steps ({then.schedule}), from step {step:,} on for {now.steps:,} ({now.schedule})"
    )
