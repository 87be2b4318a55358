"""`LowRankLinear`: the two factors, the function between them, and what is folded away: residual and scale."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldrank.core.config import Activation, FactorStart, ResidualConfig, Scale
from foldrank.core.functional import effective_weight, literal_residual
from foldrank.core.parametrization import SPEC, WeightParametrization, check_same_state
from foldrank.core.plain_linear import what_is_on
from foldrank.core.residual import DuplicatedLatentResidual
from foldrank.core.scale import LowRankScale
from foldrank.core.starts import draw_factors_

ACTIVATION_MODULES: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh}

PARAMETRIZATIONS = ("residual", "scale")
"""The attributes of a low-rank layer that make its effective weight, in the order in which they apply: s (B + c R)."""


class LowRankLinear(nn.Module):
    r"""A low-rank linear layer :math:`y = B\,\mathrm{act}(A x) + b`, with the foldable DLR residual while training.

    With a residual and a scale the output is :math:`y = s (B + c R)\,\mathrm{act}(A x) + b`, which equals the paper's
    :math:`B z + c\,\mathrm{Expand}(z) + b` with :math:`z = s\,\mathrm{act}(A x)` (arXiv 2606.28932). Without either it
    calls `up`, a plain `nn.Linear`, so that quantizers, servers and exporters that swap `nn.Linear` work on the folded
    layer. Other backbones are subclasses (docs/backbones.md).

    Args:
        in_features: d_in.
        out_features: d_out.
        rank: r, at least 1.
        activation: function between the factors; `silu` is CoLA, None plain low rank.
        scale: s, a number, or "trainable" (through tanh), or None for 1.
        bias: whether to learn b.
        residual: the residual to train with, or None.
        factor_start: how the factors are drawn (`foldrank.core.starts`).
        name: the layer's name in its model; only the random expansion depends on it.

    Shape:
        (..., in_features) to (..., out_features).

    Raises:
        ValueError: for a rank below 1 or an unknown activation.

    Example:
        >>> layer = LowRankLinear(8, 6, 2, activation="silu", residual=ResidualConfig(alpha=1.0))
        >>> layer(torch.zeros(3, 8)).shape
        torch.Size([3, 6])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        activation: Activation | None = None,
        scale: Scale | None = None,
        bias: bool = False,
        residual: ResidualConfig | None = None,
        factor_start: FactorStart = "cola",
        name: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if activation is not None and activation not in ACTIVATION_MODULES:
            raise ValueError(f"activation must be None or one of {', '.join(ACTIVATION_MODULES)}, got {activation!r}")
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.activation_name: Activation | None = activation
        self.factor_start: FactorStart = factor_start
        like: Any = {"device": device, "dtype": dtype}
        self.down = nn.Linear(in_features, rank, bias=False, **like)
        self.activation = ACTIVATION_MODULES[activation]() if activation is not None else None
        self.up = nn.Linear(rank, out_features, bias=bias, **like)
        self.residual = residual and DuplicatedLatentResidual(out_features, rank, residual, name=name, **like)
        self.scale = LowRankScale(scale, **like) if scale is not None else None
        LowRankLinear.reset_parameters(self)  # not a subclass's: its own parameters are not there yet

    @property
    def extra_config(self) -> dict[str, bool | int | float | str]:
        """The arguments that a backbone of this class takes besides those of every low-rank layer."""
        return {}

    @classmethod
    def num_extra_params(cls, in_features: int, out_features: int, **extra_config: Any) -> int:  # noqa: ARG003
        """Parameters that a layer of this class has besides its factors and bias, which a budget must know."""
        return 0

    @property
    def weight_parametrizations(self) -> tuple[WeightParametrization, ...]:
        """Residual and scale, as far as there are any; nothing once folded."""
        return tuple(part for part in (self.residual, self.scale) if part is not None)

    def reset_parameters(self) -> None:
        """Draws the factors (`foldrank.core.starts`; CoLA's are normal with deviation r^(-1/4) (d_in + d_out)^(-1/4)),
        the bias uniform in +-1/sqrt(d_out), and sets residual and scale to their start.
        """
        draw_factors_(self.down.weight, self.up.weight, self.factor_start)
        if self.up.bias is not None:
            bound = self.out_features**-0.5
            nn.init.uniform_(self.up.bias, -bound, bound)
        for part in self.weight_parametrizations:
            part.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        z = self.latents(x)
        # Nothing to add: a plain low-rank layer.
        if self.residual is self.scale is None:
            return self.up(z)
        # On the weight, at a cost that does not grow with the tokens.
        if what_is_on(self.up) is None:
            return F.linear(z, self.effective_weight(self.up.weight), self.up.bias)
        # Whatever somebody put on `up` acts when it is called: the literal equation, on activations.
        return self._literal_equation(z)

    def latents(self, x: Tensor) -> Tensor:
        """act(A x)."""
        z = self.down(x)
        return z if self.activation is None else self.activation(z)

    def effective_weight(self, weight: Tensor) -> Tensor:
        """The weight s (B + c R), given `weight`, which is B in any dtype; B itself once folded."""
        index_O, values_O = (None, None) if self.residual is None else self.residual.terms(weight)
        return effective_weight(weight, index_O, values_O, None if self.scale is None else self.scale.coefficient())

    def _literal_equation(self, z: Tensor) -> Tensor:
        z = z if self.scale is None else self.scale(z)
        y = self.up(z)
        if self.residual is None:
            return y
        state = (*self.residual.parameters(), *self.residual.buffers())
        if any(tensor.is_meta for tensor in state) and not z.is_meta:
            raise ValueError(
                "the residual's alpha or index is offloaded, where no call loads it: fold before offloading"
            )
        return y + literal_residual(z, *self.residual.terms(z)).to(y.dtype)

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *others: Any
    ) -> None:
        layer, present = prefix.rstrip("."), prefix + "up.weight" in state_dict
        for kind in PARAMETRIZATIONS:
            here, there = getattr(self, kind) is not None, f"{prefix}{kind}.{SPEC}" in state_dict
            others[-1].extend(check_same_state(layer, kind, here=here, there=there, folded_there=present))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        parts = [part.kind for part in self.weight_parametrizations]
        state = f"with {' and '.join(parts)}" if parts else "folded or never with a residual"
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, {state}"
