"""A model that is trained for a benchmark, and the gate that it must pass first."""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foldrank.anchor import fold_at_start_
from foldrank.bench.record import Gate
from foldrank.bench.settings import AT_START, Settings, computed
from foldrank.fold import fold_
from foldrank.train.model import build_model
from foldrank.tree import low_rank_layers

LOSS_BOUND = {"float32": 1e-5, "bfloat16": 1e-2}
"""How far losses of the same model may be apart, in nats. Compilers round otherwise in bfloat16."""


class TrainedModel:
    """A method's model, its optimizer, and the batch it sees: the same random tokens for every method."""

    def __init__(self, settings: Settings, method: str) -> None:
        recipe = settings.recipe_of(method)
        self.recipe = recipe
        self.device = settings.device
        self.bfloat16 = settings.bfloat16
        self.model: PreTrainedModel = build_model(recipe, settings.vocabulary_size()).to(self.device)  # pyright: ignore[reportArgumentType]
        decay = fold_at_start_(self.model) if computed(method)[0].endswith(AT_START) else None
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

    def loss(self) -> Tensor:
        """Mean loss on the benchmark's tokens."""
        with autocast(self.device, enabled=self.bfloat16):
            return self.called(**self.batch, use_cache=False).loss


def fold_gates(settings: Settings) -> list[Gate]:
    """That each method with a residual gives the loss of the same model folded.

    Raises:
        ValueError: where one does not.
    """
    found = []
    for method in dict.fromkeys(computed(method)[0].removesuffix(AT_START) for method in settings.subjects):
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


def otherwise_gates(settings: Settings) -> list[Gate]:
    """That a method that is computed otherwise gives the loss and the gradients of the same method as it is.

    The gradients of all parameters are compared at once: the norm of their difference over their norm.

    Raises:
        ValueError: where it does not.
    """
    found = []
    for method in settings.subjects:
        base, replaced = computed(method)
        if not replaced:
            continue
        (loss, gradients), (other_loss, other_gradients) = (
            _loss_and_gradients(TrainedModel(settings, name)) for name in (method, base)
        )
        difference = float((loss - other_loss).abs())
        found.append(_gate(settings, f"losses of {method} and {base}", difference))
        apart, norm = (
            sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5
            for tensors in (map(torch.sub, gradients, other_gradients), other_gradients)
        )
        found.append(_gate(settings, f"gradients of {method} and {base}", apart / norm))
    return found


def _loss_and_gradients(subject: TrainedModel) -> tuple[Tensor, list[Tensor]]:
    loss = subject.loss()
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in subject.model.parameters() if parameter.grad is not None]


def start_gates(settings: Settings, subjects: dict[str, TrainedModel]) -> list[Gate]:
    """That a model folded at the start gives, after equally many steps, the loss of the one with the residual.

    Raises:
        ValueError: where it does not.
    """
    found = []
    with torch.no_grad():
        for method, subject in subjects.items():
            other = subjects.get(method.removesuffix(AT_START))
            if other is not None and other is not subject:
                difference = float((subject.loss() - other.loss()).abs())
                found.append(
                    _gate(settings, f"losses of {method} and of the residual form after some steps", difference)
                )
    return found


def _gate(settings: Settings, what: str, difference: float) -> Gate:
    return Gate(
        what=what, difference=difference, bound=LOSS_BOUND["bfloat16" if settings.bfloat16 else "float32"]
    ).check()


def autocast(device: str, *, enabled: bool) -> AbstractContextManager[Any]:
    """Products in bfloat16, or as they come."""
    return torch.autocast(device, dtype=torch.bfloat16) if enabled else nullcontext()
