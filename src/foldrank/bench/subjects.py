"""A model that is trained for a benchmark, and the gate that it must pass first."""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldrank.anchor import fold_at_start_
from foldrank.bench.record import Gate
from foldrank.bench.settings import AT_START, Settings, split
from foldrank.fold import fold_
from foldrank.train.model import build_model
from foldrank.tree import low_rank_layers

LOSS_BOUND = {"float32": 1e-5, "bfloat16": 1e-2}
"""How far losses of the same model may be apart, in nats. Compilers round otherwise in bfloat16."""

GRADIENT_BOUND = {"float32": 1e-5, "bfloat16": 1e-2}
"""How far all gradients of the same model may be apart, over their norm. On a CPU they are equal to the last bit; some
kernels of a GPU sum in another order each time."""


class TrainedModel:
    """A method's model, its optimizer, and the batch it sees: the same random tokens for every method."""

    def __init__(self, settings: Settings, method: str) -> None:
        recipe = settings.recipe_of(method)
        self.recipe = recipe
        self.device = settings.device
        self.bfloat16 = settings.bfloat16
        self.model: PreTrainedModel = build_model(recipe, settings.vocabulary_size()).to(self.device)  # pyright: ignore[reportArgumentType]
        decay = fold_at_start_(self.model) if recipe.train.fold_at_start else None
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, weight_decay=recipe.train.weight_decay, fused=True
        )
        if decay is not None:
            decay.attach(self.optimizer)
        shape = recipe.train.batch_size, recipe.train.sequence_length
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(settings.vocabulary_size(), shape, generator=draw).to(self.device)
        self.batch = {"input_ids": ids, "labels": ids}
        self.called: Any = torch.compile(self.model) if settings.compile else self.model

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch["input_ids"].numel()

    def step(self) -> None:
        """Forward, backward, update."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def outcome(self) -> tuple[Tensor, list[Tensor]]:
        """The loss and all gradients; none are left in the model."""
        loss = self.loss()
        loss.backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.optimizer.zero_grad()
        return loss.detach(), gradients

    def loss(self) -> Tensor:
        """Mean loss on the benchmark's tokens."""
        with autocast(self.device, enabled=self.bfloat16):
            return self.called(**self.batch, use_cache=False).loss


def gates(settings: Settings) -> list[Gate]:
    """What holds before the first step.

    Raises:
        ValueError: where it does not.
    """
    return fold_gates(settings) + recomputation_gates(settings)


def recomputation_gates(settings: Settings) -> list[Gate]:
    """That each method with activation checkpointing gives the loss and the gradients of the same model without.

    Raises:
        ValueError: where one does not.
    """
    found = []
    for method in dict.fromkeys(settings.subjects):
        if settings.recipe_of(method).train.activation_checkpointing is not None:
            found += _recomputation_gates(settings, method, TrainedModel(settings, method))
    return found


def _recomputation_gates(settings: Settings, method: str, subject: TrainedModel) -> list[Gate]:
    loss, gradients = subject.outcome()
    subject.model.activation_checkpointing_disable()
    expected, expected_gradients = subject.outcome()
    apart = nn.utils.get_total_norm([one - other for one, other in zip(gradients, expected_gradients, strict=True)])
    relative = float(apart / nn.utils.get_total_norm(expected_gradients))
    what = f"of {method} with and without activation checkpointing"
    return [
        _gate(settings, f"losses {what}", float((loss - expected).abs())),
        _gate(settings, f"gradients {what}", relative, GRADIENT_BOUND),
    ]


def fold_gates(settings: Settings) -> list[Gate]:
    """That each method with a residual gives the loss of the same model folded.

    Raises:
        ValueError: where one does not.
    """
    found = []
    for method in dict.fromkeys(split(method)[0] for method in settings.subjects):
        subject = TrainedModel(settings, method)
        if all(layer.residual is None for layer in low_rank_layers(subject.model).values()):
            continue
        with torch.no_grad():
            before = subject.loss()
            subject.model = subject.called = copy.deepcopy(subject.model)
            fold_(subject.model)
            difference = float((subject.loss() - before).abs())
        found.append(_gate(settings, f"losses of {method} before and after the fold", difference))
    return found


def start_gates(settings: Settings, subjects: dict[str, TrainedModel]) -> list[Gate]:
    """That a model folded at the start gives, after equally many steps, the loss of the one with the residual.

    Raises:
        ValueError: where it does not.
    """
    found = []
    with torch.no_grad():
        for method, subject in subjects.items():
            other = subjects.get(method.replace(AT_START, ""))
            if other is not None and other is not subject:
                difference = float((subject.loss() - other.loss()).abs())
                found.append(
                    _gate(settings, f"losses of {method} and of the residual form after some steps", difference)
                )
    return found


def _gate(settings: Settings, what: str, difference: float, bounds: Mapping[str, float] = LOSS_BOUND) -> Gate:
    bound = bounds["bfloat16" if settings.bfloat16 else "float32"]
    return Gate(what=what, difference=difference, bound=bound).check()


def autocast(device: str, *, enabled: bool) -> AbstractContextManager[Any]:
    """Products in bfloat16, or as they come."""
    return torch.autocast(device, dtype=torch.bfloat16) if enabled else nullcontext()
