"""Ways to compute CoLA's layers that were tried and not kept, in turns with those of the library: a record of why.

    python benchmarks/candidates.py --recipe llama-350m-cola --layers 2 --vocabulary 2667 --batch-size 4

`cola-shared`: the down-projections that share their input (q, k, v; gate, up) lie side by side in memory, and one
product computes them all. `cola-fused-silu`: SiLU and up-projection are one operation that keeps h = A x and computes
SiLU(h) again in the backward pass. Both give the layers' own losses and gradients, which the gate checks first.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldrank.bench.interleaved import WARM_UP, interleaved_timing, timed
from foldrank.bench.memory import allocated
from foldrank.bench.record import Findings, Gate, make_record, write_record
from foldrank.bench.report import describe, table
from foldrank.bench.settings import Settings
from foldrank.bench.trained_model import TrainedModel, outcome_gates
from foldrank.core.linear import LowRankLinear
from foldrank.train.malloc import apply_malloc_settings


class _OneProduct(torch.autograd.Function):
    """x [A_1; A_2; ...]^T, with the gradient of each A apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wide: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(x, wide)
        ctx.ranks = [len(part) for part in parts]
        return F.linear(x, wide)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, wide = ctx.saved_tensors
        gradients = (grad.flatten(0, -2).T @ x.flatten(0, -2)).split(ctx.ranks)
        return grad @ wide, None, *gradients


class _Shared(nn.Module):
    """One of the layers of a group; the first computes the latents of all."""

    def __init__(
        self, layer: LowRankLinear, group: Sequence[LowRankLinear], wide: Tensor, latents: list[Tensor]
    ) -> None:
        super().__init__()
        self.layer, self.wide, self.latents = layer, wide, latents
        self.downs = [one.down for one in group] if layer is group[0] else None

    def forward(self, x: Tensor) -> Tensor:
        if self.downs is not None:
            h = _OneProduct.apply(x, self.wide, *(down.weight for down in self.downs))
            self.latents[:] = reversed(F.silu(h).split([len(down.weight) for down in self.downs], -1))  # pyright: ignore
        return self.layer.up(self.latents.pop())


def share_inputs_(model: nn.Module) -> None:
    """One product for the down-projections of q, k, v, and of gate, up."""
    for block in model.get_submodule("model.layers").children():
        for path, names in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
            place = block.get_submodule(path)
            group: list[Any] = [place.get_submodule(name) for name in names]
            wide = torch.cat([layer.down.weight.detach() for layer in group])
            for layer, part in zip(group, wide.split([layer.rank for layer in group]), strict=True):
                with torch.no_grad():
                    layer.down.weight.set_(part)  # a view: the optimizer writes into the one matrix
            latents: list[Tensor] = []
            for name, layer in zip(names, group, strict=True):
                setattr(place, name, _Shared(layer, group, wide, latents))


class _FusedSiLU(torch.autograd.Function):
    """SiLU(h) B^T, keeping h alone."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(h, b)
        return F.linear(F.silu(h), b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        h, b = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad @ b, h), grad.flatten(0, -2).T @ F.silu(h).flatten(0, -2)


class _Fused(nn.Module):
    def __init__(self, layer: LowRankLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output = _FusedSiLU.apply(self.layer.down(x), self.layer.up.weight)
        assert isinstance(output, Tensor)
        return output


def fuse_silu_(model: nn.Module) -> None:
    """SiLU and up-projection in one operation."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LowRankLinear):
                setattr(parent, name, _Fused(child))


CANDIDATES = {"cola": None, "cola-shared": share_inputs_, "cola-fused-silu": fuse_silu_}


def run(settings: Settings) -> Findings:
    """Steps the layers as they are and each candidate in turns.

    Raises:
        ValueError: where a candidate computes something else.
    """
    subjects = {name: TrainedModel(settings, "cola") for name in CANDIDATES}
    gates: list[Gate] = []
    for name, change_ in CANDIDATES.items():
        if change_ is not None:
            change_(subjects[name].model)
            found = outcome_gates(settings, "cola", subjects[name].outcome(), subjects["cola"].outcome())
            gates += [replace(gate, what=gate.what.replace("of cola and", f"of {name} and")) for gate in found]
    for subject in subjects.values():
        for _ in range(WARM_UP):
            subject.step()
    turns = {name: timed(subject.step, settings.device) for name, subject in subjects.items()}
    figures = interleaved_timing(turns, settings.rounds)
    for name, subject in subjects.items():
        kept: list[object] = []
        figures[name]["activations_bytes"], _ = allocated(lambda: kept.append(subject.loss()), settings.device)  # noqa: B023
    return Findings(cases={"step": figures}, gates=tuple(gates))


def main() -> None:
    """Measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    for name in ("layers", "vocabulary", "batch-size", "rounds"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, help="keep a record here, such as benchmarks/records")
    arguments = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    out = arguments.pop("out", None)
    settings = Settings(benchmark="step", **arguments)
    apply_malloc_settings()  # as `foldrank bench step` does
    record = make_record(replace(settings, methods=list(CANDIDATES)), run(settings))
    file = "step" if out is None else str(write_record(out, record))
    print(f"{describe(file, record)}\n\n{table(record)}", end="")


if __name__ == "__main__":
    main()
