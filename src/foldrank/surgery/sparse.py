"""SLTrain's backbone: a low-rank layer plus a sparse matrix on a fixed random support.

    y = s (B + c R) A x + S x + b        S: d_out x d_in, nonzero on the support alone

Shape suffixes: T tokens, I = d_in, O = d_out, N nonzeros.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldrank.core.derived_buffers import DerivedBuffers
from foldrank.core.drawn import named_generator
from foldrank.core.linear import LowRankLinear
from foldrank.core.plain_linear import what_is_on

DENSITY = 0.03
"""Of SLTrain's models up to 1B; at 7B it takes 0.05."""


class SparseLowRankLinear(DerivedBuffers, LowRankLinear):
    r"""A low-rank linear layer plus a sparse one, :math:`y = s B A x + S x + b` (SLTrain, arXiv 2406.02214).

    The values of S are a parameter of `int(density * d_in * d_out)` elements; where they stand is drawn once, from
    `seed` and the layer's name, and saved with the layer as compressed sparse rows in int32. A starts Kaiming-uniform,
    B at zero, the values uniform in +-1/sqrt(d_in).

    While training it multiplies by W = s (B + c R) A + S as one dense matrix, as the published code does: in about the
    time of a dense layer, and without keeping W for the backward pass. In eval mode it calls `up(down(x))` and adds S x
    row by row: that reads each parameter once, which is what generation waits for, and makes no dense matrix.

    Args:
        density: share of nonzeros in S, in (0, 1].
        seed: seed of the support.

    Raises:
        ValueError: for a density out of range, and as `LowRankLinear`.

    Example:
        >>> layer = SparseLowRankLinear(8, 16, rank=2, density=0.25)
        >>> layer.values.numel(), layer(torch.zeros(3, 8)).shape
        (32, torch.Size([3, 16]))
    """

    rows: Tensor
    columns: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        density: float = DENSITY,
        seed: int = 0,
        name: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        if not (isinstance(density, int | float) and 0 < density <= 1):
            raise ValueError(f"density must lie in (0, 1], got {density!r}")
        super().__init__(in_features, out_features, rank, name=name, device=device, dtype=dtype, **others)
        count = self.num_extra_params(in_features, out_features, density=density)
        self.density = density
        self.seed = seed
        self.name = name
        self.values = nn.Parameter(torch.empty(count, device=device, dtype=dtype))
        self.register_buffer("rows", torch.empty(out_features + 1, device=device, dtype=torch.int32))
        self.register_buffer("columns", torch.empty(count, device=device, dtype=torch.int32))
        self.reset_parameters()

    @property
    def extra_config(self) -> dict[str, bool | int | float | str]:
        return {"density": self.density, "seed": self.seed}

    @classmethod
    def num_extra_params(cls, in_features: int, out_features: int, *, density: float = DENSITY, **_: Any) -> int:
        return max(1, int(density * in_features * out_features))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As `LowRankLinear`, but A Kaiming-uniform and B zero; draws the values, and the support from its seed."""
        super().reset_parameters()
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        bound = self.in_features**-0.5
        nn.init.uniform_(self.values, -bound, bound)
        self.write_buffers()

    def write_buffers(self) -> None:
        """Draws the support from its seed."""
        if self.columns.is_meta:
            return
        total, count = self.out_features * self.in_features, self.values.numel()
        support_N = random_support(total, count, seed=self.seed, name=self.name)
        row_starts = torch.arange(self.out_features + 1, device="cpu") * self.in_features
        self.rows.copy_(torch.searchsorted(support_N, row_starts))
        self.columns.copy_(support_N % self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x) + self._rows_times(x)
        if self.activation is None and what_is_on(self.up) is what_is_on(self.down) is None:
            return self._sum_times(x, self.effective_weight(self.up.weight), self.down.weight, self.up.bias)
        # Something stands between the factors, or is on one of them: only S becomes a matrix.
        nothing = self.values.new_empty(self.out_features, 0), self.values.new_empty(0, self.in_features)
        return super().forward(x) + self._sum_times(x, *nothing, None)

    def _sum_times(self, x: Tensor, b_OR: Tensor, a_RI: Tensor, bias: Tensor | None) -> Tensor:
        """(B A + S) x + bias."""
        x_TI = x.to(compute_dtype(x)).reshape(-1, self.in_features)
        y_TO = _SumLinear.apply(x_TI, b_OR, a_RI, self.values, bias, self.rows, self.columns)
        assert isinstance(y_TO, Tensor)
        return y_TO.reshape(*x.shape[:-1], self.out_features)

    def _rows_times(self, x: Tensor) -> Tensor:
        """S x: each output is a bag of the inputs in its row, weighted by the values."""
        dtype = compute_dtype(x)
        y_OT = F.embedding_bag(
            self.columns,
            x.to(dtype).reshape(-1, self.in_features).T.contiguous(),
            self.rows,
            mode="sum",
            per_sample_weights=self.values.to(dtype),
            include_last_offset=True,
        )
        return y_OT.T.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, density={self.density:g}"


class _SumLinear(torch.autograd.Function):
    """x W^T + bias with W = B A + S, made again for the backward pass: all W saved would be a dense model.

    Shape:
        x (T, d_in), b (d_out, r), a (r, d_in), values and columns (N,), bias (d_out,) or None, rows (d_out + 1,).
        Everything is computed in the dtype of x.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x_TI: Tensor,
        b_OR: Tensor,
        a_RI: Tensor,
        values_N: Tensor,
        bias_O: Tensor | None,
        rows: Tensor,
        columns_N: Tensor,
    ) -> Tensor:
        weight_OI = _sum_weight(b_OR, a_RI, values_N, rows, columns_N, x_TI.dtype)
        return F.linear(x_TI, weight_OI, None if bias_O is None else bias_O.to(x_TI.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TI, b_OR, a_RI, values_N, bias_O, rows, columns_N = ctx.saved_tensors
        grad_x = grad_TO @ _sum_weight(b_OR, a_RI, values_N, rows, columns_N, grad_TO.dtype)
        grad_OI = grad_TO.T @ x_TI
        grad_b = (grad_OI @ a_RI.to(grad_OI.dtype).T).to(b_OR.dtype)
        grad_a = (b_OR.to(grad_OI.dtype).T @ grad_OI).to(a_RI.dtype)
        grad_values = grad_OI.flatten()[flat_support(rows, columns_N, a_RI.shape[1])].to(values_N.dtype)
        grad_bias = None if bias_O is None else grad_TO.sum(0).to(bias_O.dtype)
        return grad_x, grad_b, grad_a, grad_values, grad_bias, None, None


def _sum_weight(
    b_OR: Tensor, a_RI: Tensor, values_N: Tensor, rows: Tensor, columns_N: Tensor, dtype: torch.dtype
) -> Tensor:
    weight_OI = b_OR.to(dtype) @ a_RI.to(dtype)
    support_N = flat_support(rows, columns_N, weight_OI.shape[1])
    # In place, since nothing else holds it, unless a transform has its values apart from it.
    if torch._C._are_functorch_transforms_active():
        return weight_OI.flatten().index_add(0, support_N, values_N.to(dtype)).view_as(weight_OI)
    weight_OI.view(-1).index_add_(0, support_N, values_N.to(dtype))
    return weight_OI


def flat_support(rows: Tensor, columns_N: Tensor, in_features: int) -> Tensor:
    """Where in the flattened S the values stand: int64 (N,), increasing."""
    outputs = torch.arange(rows.numel() - 1, device=rows.device)
    # The size is given, or a GPU would have to be waited for.
    row_N = torch.repeat_interleave(outputs, rows.diff(), output_size=columns_N.numel())
    return row_N * in_features + columns_N


def random_support(total: int, count: int, *, seed: int, name: str) -> Tensor:
    """`count` distinct positions out of `total`, uniform, drawn from `seed` and the module's `name`.

    Shape:
        int64 (count,), increasing, each entry in [0, total).
    """
    generator = named_generator(seed, f"{name}/support")
    positions = torch.empty(0, dtype=torch.int64, device="cpu")
    # Sampling and dropping what came twice is many times faster than permuting all of `total`.
    while positions.numel() < count:
        more = torch.randint(total, (count + count // 8 + 8,), generator=generator, device="cpu")
        positions = torch.cat([positions, more]).unique()
    selected = torch.randperm(positions.numel(), generator=generator, device="cpu")[:count]
    return positions[selected].sort().values


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a product with x is computed: that of x, or of autocast, which leaves float64 alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
