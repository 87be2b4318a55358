"""The low-rank scale s in z = s act(A x), computed on the weight: y = B z = (s B) act(A x)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from foldrank.core.config import Scale
from foldrank.core.dtensor import full_tensor
from foldrank.core.functional import at_least_float32, effective_weight
from foldrank.core.parametrization import REQUIRED, WeightParametrization

START = 1.0
"""Start of theta in s = tanh(theta), as in the published code of ReLoRA and SLTrain."""


class LowRankScale(WeightParametrization):
    r"""Maps an up-projection's weight B to :math:`s B`, which scales the latents at a cost that no token adds to.

    Args:
        scale: s, a number; or "trainable": s = tanh(theta), theta one learned number per layer that starts at 1.

    Shape:
        any, to the same shape and dtype: the latents z as well as a weight.

    Example:
        >>> LowRankScale(0.5)(torch.ones(1, 2)).tolist()
        [[0.5, 0.5]]
    """

    kind = "scale"
    spec_defaults = {"scale": REQUIRED}  # noqa: RUF012 - ClassVar of the base class
    theta: nn.Parameter

    def __init__(
        self, scale: Scale, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(device)
        self.start = scale
        if scale == "trainable":
            self.theta = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Theta to its start, and the spec written anew."""
        self.write_buffers()
        if self.start == "trainable":
            self.theta.fill_(START)

    def forward(self, weight: Tensor) -> Tensor:
        return effective_weight(weight, scale=self.coefficient())

    def coefficient(self) -> float | Tensor:
        """s: a number, or a tensor of one element where it is trainable."""
        return tanh_scale(self.theta) if self.start == "trainable" else float(self.start)

    def spec_fields(self) -> dict[str, Any]:
        return {"scale": None if self.start == "trainable" else float(self.start)}

    def extra_repr(self) -> str:
        learned = f"s=tanh(theta), started at {math.tanh(START):.4f}"
        return learned if self.start == "trainable" else f"s={self.start:g}"


def tanh_scale(theta: Tensor) -> Tensor:
    """The trainable scale s = tanh(theta), in float32 or wider."""
    return full_tensor(theta).to(at_least_float32(theta.dtype)).tanh()
