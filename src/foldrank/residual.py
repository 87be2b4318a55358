"""The Duplicated Latent Residual (DLR) on the weight, and the literal equation it is tested against.

    y = B z + c Expand(z) + b = (B + c R) z + b        c = alpha / sqrt(K), K = ceil(d_out / r)
    Expand(z)[o] = z[index[o]],  R[o, index[o]] = 1    (arXiv 2606.28932)

Shape suffixes: O = d_out output features, R = r latents, any batch shape before them.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldrank.config import Expansion, ResidualConfig

SPEC = "spec"
"""Name of the buffer that marks a state dict as unfolded and says all that folding it needs."""


def expansion_index(
    expansion: Expansion, out_features: int, rank: int, *, device: torch.device | None = None
) -> Tensor:
    """The latent that each output repeats, for the expansions that follow from the shape alone.

    `contiguous`: o // K with K = ceil(out_features / rank), the paper's. `balanced`: floor(o * rank / out_features).

    Shape:
        int64 (out_features,), each entry in [0, rank).

    Raises:
        ValueError: for `random`, whose index is drawn once and kept (`random_index`).
    """
    output_O = torch.arange(out_features, device=device)
    if expansion == "contiguous":
        return output_O // math.ceil(out_features / rank)
    if expansion == "balanced":
        return output_O * rank // out_features
    raise ValueError(f"the index of the {expansion!r} expansion does not follow from the shape")


def random_index(out_features: int, rank: int, *, seed: int, name: str) -> Tensor:
    """A latent per output drawn uniformly from a generator seeded by `seed` and the module's `name`.

    Shape:
        int64 (out_features,), each entry in [0, rank).
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randint(rank, (out_features,), generator=generator, device="cpu")


def scale(alpha: float, out_features: int, rank: int, *, variance_correction: bool) -> float:
    """The factor c = alpha / sqrt(K) with K = ceil(out_features / rank), or alpha where variance correction is off."""
    return alpha / math.sqrt(math.ceil(out_features / rank)) if variance_correction else alpha


def add_duplicates(weight: Tensor, index_O: Tensor, c: float | Tensor, latent_dim: int = 1) -> Tensor:
    """`weight + c R`, summed in at least float32 and rounded once to the dtype of `weight`.

    One addition per output feature; the gradient reaches `weight` unchanged.

    Shape:
        weight (out_features, rank), or (rank, out_features) with `latent_dim=0`; index_O (out_features,); c a number or
        a tensor of one element.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    index = index_O.unsqueeze(latent_dim)
    c = torch.as_tensor(c, dtype=wide.dtype, device=wide.device).expand_as(index)
    return wide.scatter_add(latent_dim, index, c).to(weight.dtype)


class _LinearWithDuplicates(torch.autograd.Function):
    """`F.linear(z, B + c R, bias)` which keeps B for the backward pass, not the sum: R costs no memory in training.

    Shape:
        z (..., rank), weight (out_features, rank), bias (out_features,) or None, index_O (out_features,), c a number or
        a tensor of one element; everything is computed in the dtype of z.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, weight: Tensor, bias: Tensor | None, index_O: Tensor, c: float | Tensor) -> Tensor:
        effective = add_duplicates(weight, index_O, c).to(z.dtype)
        return F.linear(z, effective, None if bias is None else bias.to(z.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        z, weight, bias, index_O, c = inputs
        ctx.save_for_backward(z, weight, bias, index_O, c if isinstance(c, Tensor) else None)
        ctx.c = None if isinstance(c, Tensor) else c

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, weight, bias, index_O, c = ctx.saved_tensors
        c = ctx.c if c is None else c
        grad_z = grad_weight = grad_bias = grad_c = None
        if ctx.needs_input_grad[0]:
            grad_z = grad @ add_duplicates(weight, index_O, c).to(grad.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[4]:
            grad_effective = grad.reshape(-1, grad.shape[-1]).T @ z.reshape(-1, z.shape[-1])
            grad_weight = grad_effective.to(weight.dtype)
            if ctx.needs_input_grad[4]:
                grad_c = grad_effective.gather(1, index_O[:, None]).to(c.dtype).sum().view_as(c)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(bias.dtype)
        return grad_z, grad_weight, grad_bias, None, grad_c


def literal_residual(z: Tensor, index_O: Tensor, c: float | Tensor) -> Tensor:
    """The equation as the paper writes it, on activations: `c Expand(z)`. The reference of the tests.

    Shape:
        z (..., rank), result (..., out_features).
    """
    return c * z[..., index_O]


class DuplicatedLatentResidual(nn.Module):
    r"""Maps an up-projection's weight B to :math:`B + \frac{\alpha}{\sqrt{K}} R` (arXiv 2606.28932).

    R is never stored and nothing of activation size is made: each call adds one number per output feature. The state
    is a small byte buffer `spec` (JSON, unharmed by dtype casts), which makes a state dict say by itself that it is
    unfolded and how to fold it; a parameter `alpha` where alpha is trainable; and for the random expansion its `index`.

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

    alpha: nn.Parameter
    spec: Tensor
    index: Tensor | None

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
        super().__init__()
        self.config = config or ResidualConfig()
        if isinstance(self.config.alpha, Mapping):
            raise ValueError("alpha is a table by layer: pass this layer's own number (ResidualConfig.for_layer)")
        self.start = float(self.config.alpha)
        self.out_features = out_features
        self.rank = rank
        self.name = name
        self.latent_dim = latent_dim
        device = torch.get_default_device() if device is None else device
        if self.config.trainable:
            self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.register_buffer(SPEC, _encode(self.spec_fields()).to(device))
        random = self.config.expansion == "random"
        self.register_buffer("index", torch.empty(out_features, dtype=torch.int64, device=device) if random else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Alpha to its start, the random index drawn from seed and name, and the spec written anew."""
        self.spec = _encode(self.spec_fields()).to(self.spec.device)
        if self.config.trainable:
            self.alpha.fill_(self.start)
        if self.index is not None:
            self.index.copy_(random_index(self.out_features, self.rank, seed=self.config.seed, name=self.name))

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
            self.spec = _encode(self.spec_fields()).to(self.spec.device)

    def forward(self, weight: Tensor) -> Tensor:
        return add_duplicates(weight, self.latent_index(weight.device), self.c(), self.latent_dim)

    def linear(self, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`F.linear(z, self(weight), bias)`, without keeping the sum for the backward pass.

        Shape:
            z (..., rank), result (..., out_features), in the dtype of z or of autocast.
        """
        if torch.compiler.is_compiling():  # The compiler decides by itself what to keep.
            return F.linear(z, self(weight), bias)
        if torch.is_autocast_enabled(z.device.type) and z.dtype != torch.float64:  # which autocast leaves alone
            z = z.to(torch.get_autocast_dtype(z.device.type))
        output = _LinearWithDuplicates.apply(z, weight, bias, self.latent_index(weight.device), self.c())
        assert isinstance(output, Tensor)
        return output

    def latent_index(self, device: torch.device | None = None) -> Tensor:
        """The latent that each output repeats: int64 (out_features,)."""
        if self.index is not None:
            return self.index
        return expansion_index(self.config.expansion, self.out_features, self.rank, device=device)

    def c(self) -> float | Tensor:
        """The factor alpha / sqrt(K): a number, or a tensor of one element where alpha is trainable."""
        unit = scale(1.0, self.out_features, self.rank, variance_correction=self.config.variance_correction)
        if self.config.trainable:
            return self.alpha.to(torch.promote_types(self.alpha.dtype, torch.float32)) * unit
        return self.start * unit

    def spec_fields(self) -> dict[str, Any]:
        """What `spec` says of this residual, as `decode_spec` reads it."""
        return {
            "alpha": None if self.config.trainable else self.start,
            "expansion": self.config.expansion,
            "latent_dim": self.latent_dim,
            "variance_correction": self.config.variance_correction,
        }

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
        given = state_dict.get(prefix + SPEC)
        if given is not None and decode_spec(given) != self.spec_fields():
            error_msgs.append(
                f"{prefix.rstrip('.')} was saved with {decode_spec(given)} and this model has {self.spec_fields()}: "
                "build the model with the residual that the checkpoint was trained with"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        k = math.ceil(self.out_features / self.rank)
        alpha = f"{self.start:g}" + (" (trainable)" if self.config.trainable else "")
        orientation = ", latent_dim=0" if self.latent_dim == 0 else ""
        return (
            f"alpha={alpha}, K={k}, expansion={self.config.expansion}, "
            f"variance_correction={self.config.variance_correction}{orientation}"
        )


def decode_spec(spec: Tensor) -> dict[str, Any]:
    """What the `spec` of a state dict says: alpha (None: see the tensor `alpha`), expansion, variance correction, and
    which dimension of the weight counts the latents.

    Raises:
        ValueError: for bytes that no `DuplicatedLatentResidual` wrote.
    """
    try:
        fields = json.loads(bytes(spec.tolist()))
        return {name: fields[name] for name in ("alpha", "expansion", "latent_dim", "variance_correction")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the residual's spec in this state dict is damaged: {error}") from error


def _encode(fields: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(fields, sort_keys=True).encode()), dtype=torch.uint8, device="cpu")
