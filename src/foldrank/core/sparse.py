"""SLTrain's backbone: a low-rank layer plus a sparse matrix on a fixed random support.

    y = s (B + c R) A x + S x + b        S: d_out x d_in, nonzero on the support alone

Shape suffixes: T tokens, I = d_in, O = d_out, N nonzeros.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldrank.core.functional import UpMap, compute_dtype, map_gradients, map_weight
from foldrank.core.linear import LowRankLinear
from foldrank.core.residual import named_generator

DENSITY = 0.03
"""Of SLTrain's models up to 1B; at 7B it takes 0.05."""


class SparseLowRankLinear(LowRankLinear):
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
        if not self.columns.is_meta:
            support_N = random_support(
                self.out_features * self.in_features, self.values.numel(), seed=self.seed, name=self.name
            )
            starts = torch.arange(self.out_features + 1, device="cpu") * self.in_features
            self.rows.copy_(torch.searchsorted(support_N, starts))
            self.columns.copy_(support_N % self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x) + self._rows_times(x)
        if self.activation is None and type(self.down) is type(self.up) is nn.Linear:
            return self._one_weight_times(
                x, self.up.weight, self.down.weight, self.up.bias, self.up_map(self.up.weight)
            )
        # Something stands between the factors, or an adapter took the place of one: only S becomes a matrix.
        nothing = x.new_empty(self.out_features, 0), x.new_empty(0, self.in_features)
        return super().forward(x) + self._one_weight_times(x, *nothing, None, UpMap(None, None, None))

    def _one_weight_times(self, x: Tensor, b_OR: Tensor, a_RI: Tensor, bias: Tensor | None, up_map: UpMap) -> Tensor:
        """(s (B + c R) A + S) x + bias."""
        x_TI = x.to(compute_dtype(x)).reshape(-1, self.in_features)
        y_TO = _SumLinear.apply(x_TI, b_OR, a_RI, self.values, bias, self.rows, self.columns, *up_map)
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
    """x W^T + bias with W = s (B + c R) A + S, made again for the backward pass: all W kept would be a dense model.

    Shape:
        x (T, d_in), b (d_out, r), a (r, d_in), values and columns (N,), bias (d_out,) or None, rows (d_out + 1,);
        then the fields of an `UpMap`. Everything is computed in the dtype of x.
    """

    @staticmethod
    def forward(
        x_TI: Tensor,
        b_OR: Tensor,
        a_RI: Tensor,
        values_N: Tensor,
        bias_O: Tensor | None,
        rows: Tensor,
        columns_N: Tensor,
        *up_map: Any,
    ) -> Tensor:
        b_OR, a_RI, values_N = (part.to(x_TI.dtype) for part in (map_weight(b_OR, UpMap(*up_map)), a_RI, values_N))
        weight_OI = _sum_weight(b_OR, a_RI, values_N, flat_support(rows, columns_N, a_RI.shape[1]))
        return F.linear(x_TI, weight_OI, None if bias_O is None else bias_O.to(x_TI.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        *tensors, latents_O1, added_O1, s = inputs
        ctx.save_for_backward(*tensors)
        ctx.up_map = UpMap(latents_O1, added_O1, s)

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TI, b_OR, a_RI, values_N, bias_O, rows, columns_N = ctx.saved_tensors
        support_N = flat_support(rows, columns_N, a_RI.shape[1])
        mapped_OR, down_RI = map_weight(b_OR, ctx.up_map).to(grad_TO.dtype), a_RI.to(grad_TO.dtype)
        grad_x = grad_TO @ _sum_weight(mapped_OR, down_RI, values_N.to(grad_TO.dtype), support_N)
        grad_OI = grad_TO.T @ x_TI
        grad_b, grad_added, grad_s = map_gradients(grad_OI @ down_RI.T, b_OR, ctx.up_map)
        grad_a = (mapped_OR.T @ grad_OI).to(a_RI.dtype)
        grad_values = grad_OI.flatten()[support_N].to(values_N.dtype)
        grad_bias = None if bias_O is None else grad_TO.sum(0).to(bias_O.dtype)
        return grad_x, grad_b, grad_a, grad_values, grad_bias, None, None, None, grad_added, grad_s


def _sum_weight(b_OR: Tensor, a_RI: Tensor, values_N: Tensor, support_N: Tensor) -> Tensor:
    weight_OI = b_OR @ a_RI
    weight_OI.view(-1).index_add_(0, support_N, values_N)
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
    found = torch.empty(0, dtype=torch.int64, device="cpu")
    # Sampling and dropping what came twice is many times faster than permuting all of `total`.
    while found.numel() < count:
        more = torch.randint(total, (count + count // 8 + 8,), generator=generator, device="cpu")
        found = torch.cat([found, more]).unique()
    kept = torch.randperm(found.numel(), generator=generator, device="cpu")[:count]
    return found[kept].sort().values
