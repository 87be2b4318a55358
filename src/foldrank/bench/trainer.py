"""A step of the `Trainer` that pre-training runs, over one of a bare loop on the same model, batches and optimizer.

The loop is written by hand (a batch, the loss, its gradients, clipping, AdamW, the schedule), and compiled where the
other is.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, get_scheduler

from foldrank.bench.interleaved import interleaved_timing, synchronize
from foldrank.bench.record import Findings, Gate
from foldrank.bench.settings import Settings
from foldrank.bench.trained_model import autocast
from foldrank.data.order import ShuffledDataset
from foldrank.data.prepare import prepare
from foldrank.optim import factor_optimizer
from foldrank.recipes.schema import Recipe
from foldrank.train.compilation import compile_, resolve_compile
from foldrank.train.health import Health
from foldrank.train.model import build_model
from foldrank.train.run_log import RunLog
from foldrank.train.schedule import scheduler_arguments
from foldrank.train.trainer import PretrainTrainer, training_arguments

BOUND = 1e-6
"""How far the trained weights may be apart, in float32."""


class Clock(TrainerCallback):
    """Seconds of a training without its first step, before the checkpoint at its end."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.began: float | None = None
        self.seconds = 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Starts after the first step, and is read after each further one."""
        if self.began is None:
            synchronize(self.device)
            self.began = time.perf_counter()
        else:
            self.seconds = time.perf_counter() - self.began


def run(settings: Settings) -> Findings:
    """Trains the same model both ways, interleaved, from the start, some steps a round.

    Raises:
        ValueError: where there is more than one method, or the two do not come to the same weights.
    """
    if len(settings.method_names) != 1:
        raise ValueError(f"trainer takes one method, got {', '.join(settings.method_names)}")
    recipe = settings.recipe_of(settings.method_names[0]).override(
        {f"train.{name}": settings.steps + 1 for name in ("eval_every", "save_every")}
        | {"train.steps": settings.steps, "train.report_to": []}
    )
    train = recipe.train
    trained: dict[str, PreTrainedModel] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(recipe.data, Path(folder) / "data")
        order = data.training(train.sequences, seed=0, num_sequences=train.steps * train.batch_size)
        vocabulary = data.manifest.vocab_size

        def built() -> PreTrainedModel:
            model = build_model(recipe, vocabulary, device=settings.device)
            compile_(model, resolve_compile(train, settings.device))
            return model

        def bare() -> float:
            trained["bare loop"] = model = built()
            return _bare_loop(model, order, recipe, settings) / (train.steps - 1)

        def with_trainer() -> float:
            trained["Trainer"] = model = built()
            return _trainer(model, order, recipe, settings, Path(folder)) / (train.steps - 1)

        figures = interleaved_timing(
            {"bare loop": bare, "Trainer": with_trainer}, settings.rounds, warm_up=1, profile=settings.profile
        )
    pairs = zip(*(model.parameters() for model in trained.values()), strict=True)
    difference = max(float((one.detach() - other.detach()).abs().max()) for one, other in pairs)
    gate = Gate(what="weights trained by a bare loop and by Trainer", difference=difference, bound=BOUND).check()
    return Findings(cases={"step": figures}, gates=(gate,))


def _trainer(model: PreTrainedModel, order: ShuffledDataset, recipe: Recipe, settings: Settings, folder: Path) -> float:
    clock = Clock(settings.device)
    trainer = PretrainTrainer(
        model=model,
        args=training_arguments(recipe, folder),
        train_dataset=order,
        eval_dataset=order,
        keep_checkpoints=1,
        optimizer=recipe.train.optimizer,
        callbacks=[clock, Health(), RunLog(folder / "log.jsonl")],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.seconds


def _bare_loop(model: PreTrainedModel, order: ShuffledDataset, recipe: Recipe, settings: Settings) -> float:
    train = recipe.train
    optimizer = factor_optimizer(
        model, train.optimizer, lr=train.learning_rate, weight_decay=train.weight_decay, betas=train.betas
    )
    arguments = scheduler_arguments(train)
    schedule = get_scheduler(
        arguments["lr_scheduler_type"],
        optimizer,
        num_warmup_steps=arguments["warmup_steps"],
        num_training_steps=train.steps,
        scheduler_specific_kwargs=arguments["lr_scheduler_kwargs"],
    )
    began = 0.0
    for number, batch in enumerate(_batches(order, train.batch_size, settings.device)):
        if number == 1:
            synchronize(settings.device)
            began = time.perf_counter()
        with autocast(settings.device, enabled=settings.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    synchronize(settings.device)
    return time.perf_counter() - began


def _batches(order: ShuffledDataset, batch_size: int, device: str) -> Iterator[dict[str, torch.Tensor]]:
    for batch in DataLoader(order, batch_size=batch_size, pin_memory=device == "cuda"):
        yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
