"""The Duplicated Latent Residual (DLR) as a module from weight to weight: B to B + alpha / sqrt(K) R."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from foldrank.core import functional
from foldrank.core.config import ResidualConfig
from foldrank.core.drawn import random_index, random_signs
from foldrank.core.dtensor import full_tensor
from foldrank.core.parametrization import REQUIRED, WeightParametrization


class DuplicatedLatentResidual(WeightParametrization):
    r"""Maps an up-projection's weight B to :math:`B + \frac{\alpha}{\sqrt{K}} R` (arXiv 2606.28932).

    R is never stored and nothing of activation size is made: each call adds one number per output feature. The state
    is `spec`; a parameter `alpha` where alpha is trainable; and what is drawn, `index` and `signs`.

    Args:
        out_features: d_out, rows of the weight.
        rank: r, columns of the weight.
        config: alpha, variance correction, expansion.
        name: the layer's name in its model, from which the random expansion is drawn.
        latent_dim: the dimension of the weight that counts the latents, 0 for one that is stored as (r, d_out).

    Shape:
        weight (out_features, rank), or (rank, out_features) with `latent_dim=0`, to the same shape and dtype.

    Example:
        >>> residual = DuplicatedLatentResidual(4, 2, ResidualConfig(variance_correction=False))
        >>> residual(torch.zeros(4, 2)).tolist()
        [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    """

    kind = "residual"
    # A ClassVar of the base class:
    spec_defaults = dict(alpha=REQUIRED, expansion="contiguous", latent_dim=1, signs="none", variance_correction=True)  # noqa: C408, RUF012
    alpha: nn.Parameter
    index: Tensor | None
    signs: Tensor | None

    def __init__(
        self,
        out_features: int,
        rank: int,
        config: ResidualConfig | None = None,
        *,
        name: str = "",
        latent_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device)
        self.config = config or ResidualConfig()
        if isinstance(self.config.alpha, Mapping):
            raise ValueError("alpha is a table by layer: pass this layer's number (ResidualConfig.for_layer)")
        self.start = float(self.config.alpha)
        self.out_features = out_features
        self.rank = rank
        self.name = name
        self.latent_dim = latent_dim
        if self.config.trainable:
            self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        for buffer, drawn in (("index", self.config.expansion), ("signs", self.config.signs)):
            empty = torch.empty(out_features, dtype=torch.int64, device=device) if drawn == "random" else None
            self.register_buffer(buffer, empty)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Alpha to its start, index and signs drawn from seed and name, and the spec written anew."""
        self.write_buffers()
        if self.config.trainable:
            self.alpha.fill_(self.start)

    def write_buffers(self) -> None:
        super().write_buffers()
        if self.index is not None:
            self.index.copy_(random_index(self.out_features, self.rank, seed=self.config.seed, name=self.name))
        if self.signs is not None:
            self.signs.copy_(random_signs(self.out_features, seed=self.config.seed, name=self.name))

    @torch.no_grad()
    def set_alpha(self, value: float) -> None:
        """Another alpha from now on, in the outputs, the state dict and the fold; a trainable one goes on from there.

        Raises:
            ValueError: for a value that is not finite.

        Example:
            >>> residual = DuplicatedLatentResidual(2, 1, ResidualConfig(variance_correction=False))
            >>> residual.set_alpha(0.5)
            >>> residual(torch.zeros(2, 1)).flatten().tolist()
            [0.5, 0.5]
        """
        if not math.isfinite(value):
            raise ValueError(f"alpha must be a finite number, got {value!r}")
        if self.config.trainable:
            self.alpha.fill_(value)
        else:
            self.start = float(value)
            self.config = replace(self.config, alpha=self.start)
            self.write_buffers()

    def forward(self, weight: Tensor) -> Tensor:
        return functional.effective_weight(weight, *self.terms(weight), latent_dim=self.latent_dim)

    def terms(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Index and value for each output, on the device of `like`, the values in at least its dtype.

        Shape:
            int64 (out_features,) and (out_features,).
        """
        # A sum keeps nothing for the backward pass.
        values_O = torch.zeros(self.out_features, dtype=functional.at_least_float32(like.dtype), device=like.device)
        values_O = values_O + self.coefficient()
        signs_O = functional.output_signs(self.config.signs, self.out_features, drawn=self.signs, device=like.device)
        return self.latent_index(like.device), values_O if signs_O is None else values_O * signs_O.to(values_O.dtype)

    def latent_index(self, device: torch.device | None = None) -> Tensor:
        """The latent that each output repeats: int64 (out_features,)."""
        if self.index is not None:
            return self.index
        return functional.expansion_index(self.config.expansion, self.out_features, self.rank, device=device)

    def coefficient(self) -> float | Tensor:
        """C = alpha / sqrt(K): a number, or a tensor of one element, at least float32, where alpha is trainable."""
        corrected = self.config.variance_correction
        unit = functional.residual_coefficient(1.0, self.out_features, self.rank, variance_correction=corrected)
        if self.config.trainable:
            return full_tensor(self.alpha).to(functional.at_least_float32(self.alpha.dtype)) * unit
        return self.start * unit

    def spec_fields(self) -> dict[str, Any]:
        return {
            "alpha": None if self.config.trainable else self.start,
            "expansion": self.config.expansion,
            "latent_dim": self.latent_dim,
            "signs": self.config.signs,
            "variance_correction": self.config.variance_correction,
        }

    def extra_repr(self) -> str:
        alpha = f"{self.start:g}" + (" (trainable)" if self.config.trainable else "")
        first = {"alpha": alpha, "K": math.ceil(self.out_features / self.rank)}
        usual = {"latent_dim": 1, "signs": "none"}
        fields = {**first, **self.spec_fields(), **first}.items()
        return ", ".join(f"{name}={value}" for name, value in fields if usual.get(name, ...) != value)
