"""What Trainer is told: which weights decay, the learning rate at each step, and the data in our order."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.integrations.integration_utils import get_available_reporting_integrations

from foldrank.data.order import ShuffledDataset
from foldrank.data.sequences import PackedBlocks
from foldrank.recipes import RECIPES
from foldrank.recipes.schema import Recipe
from foldrank.train.model import build_model
from foldrank.train.trainer import PretrainTrainer, training_arguments

from ..small_runs import SMALL_MODEL

SMALL = RECIPES["demo"].override(
    {
        **SMALL_MODEL,
        "train.steps": 40,
        "train.batch_size": 4,
        "train.sequence_length": 16,
        "train.device": "cpu",
    }
)
VOCABULARY = 61


def trainer_of(recipe: Recipe, out: Path) -> PretrainTrainer:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, size=1000).astype("<u2")
    blocks = PackedBlocks([tokens], recipe.train.sequence_length)
    order = ShuffledDataset(blocks, recipe.seed, num_sequences=recipe.train.steps * recipe.train.batch_size)
    return PretrainTrainer(
        model=build_model(recipe, VOCABULARY),
        args=training_arguments(recipe, out),
        train_dataset=order,
        eval_dataset=blocks,
        keep_checkpoints=2,
    )


def test_weight_decay_is_for_matrices_alone(tmp_path: Path) -> None:
    recipe = SMALL.override({"low_rank.residual.trainable": True, "train.weight_decay": 0.3})
    trainer = trainer_of(recipe, tmp_path)
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in build_named(trainer)}
    decay = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert decay.keys() == {0.3, 0.0}
    assert decay[0.3] | decay[0.0] == set(names.values())
    assert {name for name in names.values() if name.endswith(("norm.weight", "residual.alpha"))} == decay[0.0]
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= decay[0.3]
    assert len(decay[0.0]) == 5 + 14
    assert all(group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)


def build_named(trainer: PretrainTrainer) -> list[tuple[str, Tensor]]:
    assert isinstance(trainer.model, torch.nn.Module)
    return list(trainer.model.named_parameters())


@pytest.mark.parametrize(("warmup_ratio", "warmup"), [(0.25, 10), (0.0, 0)])
def test_learning_rate_warms_up_linearly_and_follows_a_cosine_to_its_end(
    tmp_path: Path, warmup_ratio: float, warmup: int
) -> None:
    settings = {"train.learning_rate": 0.02, "train.warmup_ratio": warmup_ratio, "train.min_learning_rate_ratio": 0.1}
    trainer = trainer_of(SMALL.override(settings), tmp_path)
    trainer.create_optimizer_and_scheduler(num_training_steps=40)
    schedule: Any = trainer.lr_scheduler
    for step in range(41):
        if step < warmup:
            expected = step / warmup
        else:
            progress = (step - warmup) / (40 - warmup)
            expected = 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
        assert 0.02 * schedule.lr_lambdas[0](step) == pytest.approx(0.02 * expected, rel=1e-12)
    assert schedule.lr_lambdas[0](warmup) == 1.0
    assert schedule.lr_lambdas[0](40) == pytest.approx(0.1)


def batches(trainer: PretrainTrainer) -> list[Tensor]:
    return [batch["input_ids"] for batch in trainer.get_train_dataloader()]


@pytest.mark.parametrize(
    "settings",
    [
        {"low_rank": None},
        {"low_rank.residual": None},
        {"low_rank.activation": None},
        {"train.micro_batch_size": 1},
        {"train.micro_batch_size": 2},
        {"train.loader_workers": 2},
        {"train.learning_rate": 0.1},
    ],
    ids=str,
)
def test_methods_and_batching_meet_the_same_sequences_in_the_same_order(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    expected = torch.cat(batches(trainer_of(SMALL, tmp_path)))
    assert expected.shape == (160, 16)
    found = batches(trainer_of(SMALL.override(settings), tmp_path))
    assert len(found) == 160 // (settings.get("train.micro_batch_size") or 4)
    assert torch.equal(torch.cat(found), expected)


def test_another_seed_is_another_order(tmp_path: Path) -> None:
    one, other = (torch.cat(batches(trainer_of(SMALL.override({"seed": seed}), tmp_path))) for seed in (0, 1))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_accumulated_steps_are_the_steps_of_the_whole_batch(micro_batch_size: int, tmp_path: Path) -> None:
    def losses(**settings: Any) -> list[float]:
        few = {"train.steps": 4, "train.warmup_ratio": 0, "train.save_every": 100}
        trainer = trainer_of(SMALL.override({**few, **settings}), tmp_path / str(len(settings)))
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = losses()
    assert len(whole) == 4
    assert whole[0] != pytest.approx(whole[3], rel=1e-3), "four steps should change something"
    assert losses(**{"train.micro_batch_size": micro_batch_size}) == pytest.approx(whole, rel=1e-5)


def test_a_forward_pass_takes_at_most_a_micro_batch(tmp_path: Path) -> None:
    arguments = training_arguments(SMALL.override({"train.batch_size": 8, "train.micro_batch_size": 3}), tmp_path)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (2, 4)


def test_other_logs_know_the_run_by_its_folder_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    recipe = SMALL.override({"seed": 7, "train.report_to": ["all"]})
    arguments = training_arguments(recipe, tmp_path / "wide")
    assert (arguments.run_name, arguments.project) == ("wide-seed7", "foldrank")
    assert arguments.report_to == get_available_reporting_integrations()
    assert os.environ["WANDB_PROJECT"] == "foldrank"


@pytest.mark.parametrize(("dtype", "bf16"), [("float32", False), ("bfloat16", True)])
def test_precision_and_no_other_logs_than_asked_for(dtype: str, bf16: bool, tmp_path: Path) -> None:
    arguments = training_arguments(SMALL.override({"train.dtype": dtype}), tmp_path)
    assert arguments.bf16 is bf16
    assert arguments.report_to == []
    assert arguments.max_grad_norm == 0.5
    assert not arguments.do_predict
