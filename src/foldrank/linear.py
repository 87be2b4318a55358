"""`LowRankLinear`: the two factors, the function between them, and the residual while training."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foldrank.config import Activation, ResidualConfig
from foldrank.residual import SPEC, DuplicatedLatentResidual

ACTIVATION_MODULES: dict[Activation, type[nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
}


class LowRankLinear(nn.Module):
    r"""A low-rank linear layer :math:`y = B\,\mathrm{act}(A x) + b`, with the foldable DLR residual while training.

    With a residual the output is :math:`y = (B + c R)\,\mathrm{act}(A x) + b`, which equals the paper's
    :math:`B z + c\,\mathrm{Expand}(z) + b` (arXiv 2606.28932). Without one it calls `up`, a plain `nn.Linear`, so that
    quantizers, servers and exporters that swap `nn.Linear` work on the folded layer.

    Args:
        in_features: d_in.
        out_features: d_out.
        rank: r, at least 1.
        activation: function between the factors; `silu` is CoLA, None plain low rank.
        bias: whether to learn b.
        residual: the residual to train with, or None.
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
        bias: bool = False,
        residual: ResidualConfig | None = None,
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
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.activation = ACTIVATION_MODULES[activation]() if activation is not None else None
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.residual = (
            DuplicatedLatentResidual(out_features, rank, residual, name=name, device=device, dtype=dtype)
            if residual is not None
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the factors normal with deviation r^(-1/4) (d_in + d_out)^(-1/4) (CoLA), the bias uniform in
        +-1/sqrt(d_out), and sets the residual to its start.
        """
        std = self.rank**-0.25 * (self.in_features + self.out_features) ** -0.25
        nn.init.normal_(self.down.weight, std=std)
        nn.init.normal_(self.up.weight, std=std)
        if self.up.bias is not None:
            bound = self.out_features**-0.5
            nn.init.uniform_(self.up.bias, -bound, bound)
        if self.residual is not None:
            self.residual.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        z = self.down(x)
        if self.activation is not None:
            z = self.activation(z)
        if self.residual is None:
            return self.up(z)
        return self.residual.linear(z, self.up.weight, self.up.bias)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Goes through error_msgs, which load_state_dict raises with strict=False too.
        unfolded = prefix + "residual." + SPEC in state_dict
        if self.residual is None and unfolded:
            error_msgs.append(
                f"{prefix.rstrip('.')} is folded and the state dict is not: load it into a model with the residual, "
                "or fold the state dict first (foldrank.fold_state_dict)"
            )
        if self.residual is not None and prefix + "up.weight" in state_dict and not unfolded:
            error_msgs.append(
                f"{prefix.rstrip('.')} has a residual and the state dict is folded: it would be added a second time. "
                "Load it into a model without residual (residual=None, or fold_ the model first)"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        state = "folded or never with a residual" if self.residual is None else "with residual"
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, {state}"
