"""The Duplicated Latent Residual (DLR) on the weight, and the literal equation it is tested against.

    y = B z + c Expand(z) + b = (B + c R) z + b        c = alpha / sqrt(K), K = ceil(d_out / r)
    Expand(z)[o] = z[index[o]],  R[o, index[o]] = 1    (arXiv 2606.28932)

Shape suffixes: O = d_out output features, R = r latents, any batch shape before them.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from foldrank.core.config import Expansion, ResidualConfig
from foldrank.core.dtensor import full_tensor
from foldrank.core.parametrization import WeightParametrization


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
    if expansion == "contiguous":
        numerator, divisor = 1, math.ceil(out_features / rank)
    elif expansion == "balanced":
        numerator, divisor = rank, out_features
    else:
        raise ValueError(f"the index of the {expansion!r} expansion does not follow from the shape")
    output_O = torch.arange(out_features, device=device) * numerator
    if torch.compiler.is_compiling():
        # PyTorch 2.13's compiler leaves the end of a divided range unwritten on a CPU (2736 // 11, more than one
        # thread). Of whole numbers as small as these the quotient in float64 has the right floor.
        return (output_O.double() / divisor).floor().long()
    return output_O // divisor


def random_index(out_features: int, rank: int, *, seed: int, name: str) -> Tensor:
    """A latent per output drawn uniformly from a generator seeded by `seed` and the module's `name`.

    Shape:
        int64 (out_features,), each entry in [0, rank).
    """
    return torch.randint(rank, (out_features,), generator=named_generator(seed, name), device="cpu")


def named_generator(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU for what is drawn once for the module called `name`, whatever was drawn before."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def scale(alpha: float, out_features: int, rank: int, *, variance_correction: bool) -> float:
    """The factor c = alpha / sqrt(K) with K = ceil(out_features / rank), or alpha where variance correction is off."""
    return alpha / math.sqrt(math.ceil(out_features / rank)) if variance_correction else alpha


WIDE = (torch.float32, torch.float64)
"""The dtypes in which the residual is added."""


def add_entries(weight: Tensor, index: Tensor, added: Tensor, latent_dim: int = 1) -> Tensor:
    """`weight` with `added` to the entry of each output that `index` names. Another tensor, or what a compiler fuses.

    Shape:
        weight (out_features, rank), or (rank, out_features) with `latent_dim=0`; index and added of its shape, but 1 at
        `latent_dim`.
    """
    if not torch.compiler.is_compiling():
        return weight.scatter_add(latent_dim, index, added)
    # No compiler needs a scatter here, which some compute one by one, or call as it is.
    latents = torch.arange(weight.shape[latent_dim], device=weight.device).unsqueeze(1 - latent_dim)
    return weight + (index == latents) * added


def add_duplicates(weight: Tensor, index_O: Tensor, c: float | Tensor, latent_dim: int = 1) -> Tensor:
    """`weight + c R`, summed in at least float32 and rounded once to the dtype of `weight`.

    One addition per output feature; the gradient reaches `weight` unchanged.

    Shape:
        weight (out_features, rank), or (rank, out_features) with `latent_dim=0`; index_O (out_features,); c a number or
        a tensor of one element.
    """
    wide = weight if weight.dtype in WIDE else weight.float()
    index = index_O.unsqueeze(latent_dim)
    added = torch.as_tensor(c, dtype=wide.dtype, device=wide.device).expand_as(index)
    return add_entries(wide, index, added, latent_dim).to(weight.dtype)


def literal_residual(z: Tensor, index_O: Tensor, c: float | Tensor) -> Tensor:
    """The equation as the paper writes it, on activations: `c Expand(z)`. The reference of the tests.

    Shape:
        z (..., rank), result (..., out_features).
    """
    return c * z[..., index_O]


_ENTRIES: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
"""What `DuplicatedLatentResidual.entries` gives, by all that it depends on. Layers of one shape share it, since making
it anew costs a small model 1 % of its step."""


class DuplicatedLatentResidual(WeightParametrization):
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

    kind = "residual"
    spec_names = ("alpha", "expansion", "latent_dim", "variance_correction")
    alpha: nn.Parameter
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
        super().__init__(device)
        self.config = config or ResidualConfig()
        if isinstance(self.config.alpha, Mapping):
            raise ValueError("alpha is a table by layer: pass this layer's own number (ResidualConfig.for_layer)")
        self.start = float(self.config.alpha)
        self.out_features = out_features
        self.rank = rank
        self.name = name
        self.latent_dim = latent_dim
        if self.config.trainable:
            self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        random = self.config.expansion == "random"
        self.register_buffer("index", torch.empty(out_features, dtype=torch.int64, device=device) if random else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Alpha to its start, the random index drawn from seed and name, and the spec written anew."""
        self.write_spec()
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
            self.write_spec()

    def forward(self, weight: Tensor) -> Tensor:
        return add_duplicates(weight, self.latent_index(weight.device), self.c(), self.latent_dim)

    def latent_index(self, device: torch.device | None = None) -> Tensor:
        """The latent that each output repeats: int64 (out_features,)."""
        if self.index is not None:
            return self.index
        return expansion_index(self.config.expansion, self.out_features, self.rank, device=device)

    def entries(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The latents that `weight` (out_features, rank) is added to, and what is added, in at least its dtype.

        Shape:
            int64 (out_features, 1) and (out_features, 1), the second of one element expanded.
        """
        dtype, device = weight.dtype if weight.dtype in WIDE else torch.float32, weight.device
        c = self.c()
        # A compiler or a transform would leave tensors of its own among the shared ones.
        foreign = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if foreign or isinstance(c, Tensor) or self.index is not None:
            return self._new_entries(c, dtype, device)
        key = (self.config.expansion, self.out_features, self.rank, c, dtype, device)
        if (found := _ENTRIES.get(key)) is None:
            with torch.inference_mode(mode=False):
                found = self._new_entries(c, dtype, device)
            if type(found[0]) is Tensor:
                _ENTRIES[key] = found
        return found

    def _new_entries(self, c: float | Tensor, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        added = torch.as_tensor(c, dtype=dtype, device=device).expand(self.out_features, 1)
        return self.latent_index(device)[:, None], added

    def c(self) -> float | Tensor:
        """The factor alpha / sqrt(K): a number, or a tensor of one element where alpha is trainable."""
        unit = scale(1.0, self.out_features, self.rank, variance_correction=self.config.variance_correction)
        if self.config.trainable:
            return full_tensor(self.alpha).to(torch.promote_types(self.alpha.dtype, torch.float32)) * unit
        return self.start * unit

    def spec_fields(self) -> dict[str, Any]:
        return {
            "alpha": None if self.config.trainable else self.start,
            "expansion": self.config.expansion,
            "latent_dim": self.latent_dim,
            "variance_correction": self.config.variance_correction,
        }

    def extra_repr(self) -> str:
        k = math.ceil(self.out_features / self.rank)
        alpha = f"{self.start:g}" + (" (trainable)" if self.config.trainable else "")
        orientation = ", latent_dim=0" if self.latent_dim == 0 else ""
        return (
            f"alpha={alpha}, K={k}, expansion={self.config.expansion}, "
            f"variance_correction={self.config.variance_correction}{orientation}"
        )
