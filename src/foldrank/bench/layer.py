"""Forward and backward pass of one layer, for each shape that the recipe's blocks have.

Among the methods may be the residual as the paper writes it, on activations, for the record: foldrank computes it on
the weight.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foldrank.bench.activations import on_activations_
from foldrank.bench.interleaved import interleaved_timing, timed
from foldrank.bench.record import Findings, Gate
from foldrank.bench.settings import COMPILED, ON_ACTIVATIONS, Settings, parse
from foldrank.bench.trained_model import autocast
from foldrank.surgery.factorize import factorize_

BOUND = {"float32": 1e-4, "bfloat16": 5e-2}
"""How far outputs and gradients of the same layer may be apart, relative to their norm."""


class Pass:
    """A layer, and a forward and backward pass of it."""

    def __init__(
        self, layer: nn.Module, x: Tensor, cotangent: Tensor, settings: Settings, *, compiled: bool = False
    ) -> None:
        self.layer, self.x, self.cotangent = layer, x, cotangent
        self.called: Any = torch.compile(layer) if compiled else layer
        self.device, self.bfloat16 = settings.device, settings.bfloat16

    def __call__(self) -> Tensor:
        """The output, gradients left in input and parameters."""
        for tensor in (self.x, *self.layer.parameters()):
            tensor.grad = None
        with autocast(self.device, enabled=self.bfloat16):
            y = self.called(self.x)
        y.backward(self.cotangent.to(y.dtype))
        return y.detach()

    def outcome(self) -> list[Tensor]:
        """Output and gradients."""
        y = self()
        return [y, *(tensor.grad.clone() for tensor in (self.x, *self.layer.parameters()) if tensor.grad is not None)]


def run(settings: Settings) -> Findings:
    """Passes of every method's layer, interleaved, shape by shape.

    Raises:
        ValueError: where the numerics gate fails.
    """
    d, f = settings.sizes().model.hidden_size, settings.sizes().model.intermediate_size
    cases, gates = {}, []
    for in_features, out_features in ((d, d), (d, f), (f, d)):
        passes = _passes(settings, in_features, out_features)
        case = f"{in_features} to {out_features}"
        gates += _gates(settings, case, passes)
        timers = {method: timed(one, settings.device) for method, one in passes.items()}
        cases[case] = interleaved_timing(timers, settings.rounds, profile=settings.profile)
    return Findings(cases=cases, gates=tuple(gates))


def _passes(settings: Settings, in_features: int, out_features: int) -> dict[str, Pass]:
    train = settings.sizes().train
    draw = torch.Generator().manual_seed(0)
    shape = train.batch_size, train.sequence_length
    x = torch.randn(*shape, in_features, generator=draw).to(settings.device).requires_grad_()
    cotangent = torch.randn(*shape, out_features, generator=draw).to(settings.device)
    outcomes = {}
    for method in settings.method_names:
        config = settings.recipe_of(method).low_rank
        if config is not None and config.backbone == "crnet":
            raise ValueError("a layer of crnet computes nothing without the block before it: take bench step")
        torch.manual_seed(0)
        holder = nn.ModuleDict({"q_proj": nn.Linear(in_features, out_features, bias=False)})
        if config is not None:
            factorize_(holder, config)
        variants = parse(method).variants
        if ON_ACTIVATIONS in variants:
            on_activations_(holder)
        layer = holder["q_proj"].to(settings.device)
        outcomes[method] = Pass(layer, x, cotangent, settings, compiled=COMPILED in variants)
    return outcomes


def _gates(settings: Settings, case: str, passes: Mapping[str, Pass]) -> list[Gate]:
    """That a method that is computed otherwise gives the outputs and gradients of the method itself."""
    outcomes = []
    for method, one in passes.items():
        other = passes.get(str(parse(method).plain))
        if other is None or other is one:
            continue
        pairs = zip(one.outcome(), other.outcome(), strict=True)
        difference = max(float((a - b).norm() / b.norm()) for a, b in pairs)
        bound = BOUND["bfloat16" if settings.bfloat16 else "float32"]
        what = f"{case}: outputs and gradients of {method} and {parse(method).plain}"
        outcomes.append(Gate(what=what, difference=difference, bound=bound).check())
    return outcomes
