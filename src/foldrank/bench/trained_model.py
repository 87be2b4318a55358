"""A model that is trained for a benchmark, and the gates that it must pass first."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldrank.bench.activations import on_activations_
from foldrank.bench.record import Gate
from foldrank.bench.settings import AT_START, ON_ACTIVATIONS, Settings, parse
from foldrank.core.anchored_decay import fold_at_start_
from foldrank.core.fold import fold_
from foldrank.core.inventory import low_rank_layers
from foldrank.optim import factor_optimizer
from foldrank.train.compilation import compile_, resolve_compile
from foldrank.train.model import build_model

LOSS_BOUND = {"float32": 1e-5, "bfloat16": 1e-2}
"""How far losses of the same model may be apart, in nats. Compilers round otherwise in bfloat16."""

GRADIENT_BOUND = {"float32": 1e-5, "bfloat16": 5e-2}
"""How far all gradients of the same model may be apart, over their norm."""


class TrainedModel:
    """A method's model, its optimizer, and the batch it sees: the same random tokens for every method."""

    def __init__(self, settings: Settings, method: str) -> None:
        recipe = settings.recipe_of(method)
        variants = parse(method).variants
        self.recipe = recipe
        self.device = settings.device
        self.model: PreTrainedModel = build_model(recipe, settings.vocabulary_size(), device=self.device)
        decay = fold_at_start_(self.model).decay if recipe.train.fold_at_start else None
        if ON_ACTIVATIONS in variants:
            on_activations_(self.model)
        self.optimizer = factor_optimizer(
            self.model, recipe.train.optimizer, lr=1e-4, weight_decay=recipe.train.weight_decay
        )
        if decay is not None:
            decay.attach(self.optimizer)
        shape = recipe.train.batch_size, recipe.train.sequence_length
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(settings.vocabulary_size(), shape, generator=draw).to(self.device)
        self.batch = {"input_ids": ids, "labels": ids}
        compile_(self.model, resolve_compile(recipe.train, self.device))

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
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        self.optimizer.zero_grad()
        return loss.detach(), gradients

    def loss(self) -> Tensor:
        """Mean loss on the benchmark's tokens."""
        with autocast(self.device, enabled=self.recipe.train.dtype == "bfloat16"):
            return self.model(**self.batch, use_cache=False).loss


def gates(settings: Settings) -> list[Gate]:
    """What holds before the first step.

    Raises:
        ValueError: where it does not.
    """
    return fold_gates(settings) + variant_gates(settings)


def variant_gates(settings: Settings) -> list[Gate]:
    """That each method that is computed otherwise gives the loss and all gradients of the method itself.

    Raises:
        ValueError: where one does not.
    """
    passed, outcomes = [], {}
    for method in dict.fromkeys(settings.method_names):
        kind = str(parse(method).plain)
        if method != kind:
            if kind not in outcomes:
                outcomes[kind] = TrainedModel(settings, kind).outcome()
            passed += outcome_gates(settings, method, TrainedModel(settings, method).outcome(), outcomes[kind])
    return passed


def outcome_gates(
    settings: Settings, method: str, outcome: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]
) -> list[Gate]:
    """That loss and gradients of a method are those expected.

    Raises:
        ValueError: where they are not.
    """
    (loss, gradients), (expected_loss, expected_gradients) = outcome, expected
    what = f"of {method} and {parse(method).plain}"
    return [
        _gate(settings, method, f"losses {what}", float((loss - expected_loss).abs())),
        _gate(settings, method, f"gradients {what}", _apart(gradients, expected_gradients), GRADIENT_BOUND),
    ]


def _apart(tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The norm of the difference of all tensors, over their norm."""
    differences = [one - other for one, other in zip(tensors, expected, strict=True)]
    return float(nn.utils.get_total_norm(differences) / nn.utils.get_total_norm(expected))


def fold_gates(settings: Settings) -> list[Gate]:
    """That each method with a residual gives the loss of the same model folded.

    Raises:
        ValueError: where one does not.
    """
    passed = []
    for method in dict.fromkeys(str(parse(method).plain) for method in settings.method_names):
        trained = TrainedModel(settings, method)
        if all(layer.residual is None for layer in low_rank_layers(trained.model).values()):
            continue
        with torch.no_grad():
            before = trained.loss()
            trained.model = copy.deepcopy(trained.model)
            fold_(trained.model)
            difference = float((trained.loss() - before).abs())
        passed.append(_gate(settings, method, f"losses of {method} before and after the fold", difference))
    return passed


def start_gates(settings: Settings, models: dict[str, TrainedModel]) -> list[Gate]:
    """That a model folded at the start gives, after equally many steps, the loss of the one with the residual.

    Raises:
        ValueError: where it does not.
    """
    passed = []
    with torch.no_grad():
        for method, trained in models.items():
            other = models.get(str(parse(method).without(AT_START)))
            if other is not None and other is not trained:
                difference = float((trained.loss() - other.loss()).abs())
                what = f"losses of {method} and of the residual form after some steps"
                passed.append(_gate(settings, method, what, difference))
    return passed


def _gate(settings: Settings, method: str, what: str, difference: float, bounds: dict[str, float] = LOSS_BOUND) -> Gate:
    bound = bounds[settings.recipe_of(method).train.dtype]
    return Gate(what=what, difference=difference, bound=bound).check()


def autocast(device: str, *, enabled: bool) -> AbstractContextManager[Any]:
    """Products in bfloat16, or as they come."""
    return torch.autocast(device, dtype=torch.bfloat16) if enabled else nullcontext()
