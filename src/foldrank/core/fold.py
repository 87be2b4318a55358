"""The fold: B* = s (B + c R) in float32, rounded once. On a tensor, on a state dict, on a model. One way only."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foldrank.core.attached import attached_residuals, detach
from foldrank.core.config import Expansion, Signs
from foldrank.core.derived_buffers import as_integers
from foldrank.core.dtensor import distribute_like, full_tensor
from foldrank.core.finite import all_finite
from foldrank.core.functional import (
    at_least_float32,
    effective_weight,
    expansion_index,
    output_signs,
    residual_coefficient,
)
from foldrank.core.inventory import Inventory, inventory
from foldrank.core.linear import PARAMETRIZATIONS, LowRankLinear
from foldrank.core.parametrization import SPEC, WeightParametrization
from foldrank.core.plain_linear import what_is_on
from foldrank.core.residual import DuplicatedLatentResidual
from foldrank.core.scale import LowRankScale, tanh_scale

logger = logging.getLogger(__name__)

SPEC_KEY = re.compile(
    rf"(?P<layer>(?:.*\.)?)(?P<kind>{'|'.join(PARAMETRIZATIONS)})\.{SPEC}"
    rf"|(?P<attached>(?:.*\.)?parametrizations\.[^.]+\.)0\.{SPEC}"
)
"""Keys that say how to fold: the weight of a low-rank layer, or one to which `attach_residual_` gave a residual."""

ATTACHED = re.compile(r"(?P<owner>(?:.*\.)?)parametrizations\.(?P<weight>[^.]+)\.original")
"""Keys of attached weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldReport:
    """What `fold_` did, per layer.

    Example:
        >>> from foldrank import LowRankConfig, ResidualConfig, factorize_
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> _ = factorize_(model, LowRankConfig(rank=2, targets=["0"], residual=ResidualConfig()))
        >>> report = fold_(model)
        >>> list(report.errors), report.max_abs_error < 1e-6
        (['0'], True)
    """

    errors: Mapping[str, float]
    """From the name of a low-rank layer, or of an attached weight, to the largest rounding error of an entry of its
    B*, against the sum in float64."""

    @property
    def max_abs_error(self) -> float:
        """The largest rounding error of all layers; 0.0 where there was nothing to fold."""
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        width = max((len(name) for name in self.errors), default=0)
        lines = [f"{name.ljust(width)}  {error:.3e}" for name, error in self.errors.items()]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line: how many layers, and the largest error."""
        return f"folded {len(self.errors)} low-rank layers; largest rounding of a weight {self.max_abs_error:.3e}"


def fold_weight(
    weight: Tensor,
    *,
    alpha: float | Tensor = 1.0,
    expansion: Expansion = "contiguous",
    variance_correction: bool = True,
    signs: Signs | Tensor = "none",
    index: Tensor | None = None,
    scale: float | Tensor = 1.0,
    latent_dim: int = 1,
) -> Tensor:
    """The folded up-projection B* = s (B + alpha / sqrt(K) R), computed in float32 (or wider) and rounded once.

    Args:
        weight: B, unchanged.
        alpha: strength of the residual.
        expansion: which latent each output repeats; for `random` give `index`.
        variance_correction: divide alpha by sqrt(K), K = ceil(d_out / r).
        signs: of the residual by output; for random ones give them, +1 and -1.
        index: the latent of each output, in place of the expansion's own.
        scale: the low-rank scale s.
        latent_dim: the dimension of `weight` that counts the latents: 1 for (d_out, r), 0 for (r, d_out).

    Shape:
        (d_out, r), or (r, d_out) with `latent_dim=0`; index and signs (d_out,); the result is shaped as `weight`.

    Raises:
        ValueError: for a weight, alpha or scale that is not finite, a weight that is no matrix, an index or signs that
            do not fit.

    Example:
        >>> fold_weight(torch.zeros(4, 1), alpha=3.0).flatten().tolist()
        [1.5, 1.5, 1.5, 1.5]
    """
    if weight.dim() != 2 or latent_dim not in (0, 1):
        raise ValueError(
            f"fold_weight takes a matrix and latent_dim 0 or 1, got {tuple(weight.shape)} and {latent_dim}"
        )
    if weight.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"a weight of {weight.dtype} cannot be folded: fold before it is quantized")
    _check_finite("weight", weight)
    out_features, rank = weight.shape[1 - latent_dim], weight.shape[latent_dim]
    if index is None:
        index = expansion_index(expansion, out_features, rank, device=weight.device)
    elif index.shape != (out_features,):
        raise ValueError(f"index must hold one latent for each of {out_features} outputs, got {tuple(index.shape)}")
    elif out_features and not 0 <= int(index.min()) <= int(index.max()) < rank:
        raise ValueError(f"index must lie in [0, {rank}), got {int(index.min())} to {int(index.max())}")
    _check_finite("alpha", torch.as_tensor(alpha))
    _check_finite("scale", torch.as_tensor(scale))
    gathered = full_tensor(weight)
    c = _wide(alpha) * residual_coefficient(1.0, out_features, rank, variance_correction=variance_correction)
    # Without a scale, or a checkpoint would take one more pass over each weight.
    s = None if isinstance(scale, float) and scale == 1.0 else _wide(scale)
    signs_O = signs if isinstance(signs, Tensor) else output_signs(signs, out_features, device=gathered.device)
    if signs_O is not None and (signs_O.shape != (out_features,) or not bool((signs_O.abs() == 1).all())):
        raise ValueError(f"signs must be +1 or -1 for each of {out_features} outputs")
    values_O = torch.as_tensor(c, dtype=at_least_float32(weight.dtype), device=gathered.device).expand(out_features)
    values_O = values_O if signs_O is None else values_O * signs_O.to(values_O)
    folded = effective_weight(gathered, index, values_O, s, latent_dim)
    return distribute_like(folded, like=weight)


def fold_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the folded model, without a model: each `up.weight` and each attached weight folded, residuals
    and scales left out. An attached weight goes back to the name that it had (`parametrizations.W.original` to `W`).

    Tensors that need no fold are passed on as they are. Folding a folded state dict changes nothing.

    Raises:
        ValueError: for a weight or alpha that is not finite, a spec that is damaged, or a residual that is not whole.

    Example:
        >>> from foldrank import LowRankLinear, ResidualConfig
        >>> layer = LowRankLinear(8, 16, rank=2, residual=ResidualConfig())
        >>> sorted(fold_state_dict(layer.state_dict()))
        ['down.weight', 'up.weight']
    """
    plan = fold_plan(state_dict)
    check_whole(plan, state_dict)
    dropped = unfolded_keys(state_dict)
    return {
        folded_key(key) if key in plan else key: plan[key](value) if key in plan else value
        for key, value in state_dict.items()
        if key not in dropped
    }


def folded_key(key: str) -> str:
    """The key of a weight that `fold_plan` names, once it is folded."""
    return ATTACHED.sub(r"\g<owner>\g<weight>", key)


def unfolded_keys(keys: Iterable[str]) -> set[str]:
    """Those of a state dict's keys that belong to residuals and scales; a folded state dict has none."""
    keys = set(keys)
    prefixes = [key.removesuffix(SPEC) for key in keys if SPEC_KEY.fullmatch(key)]
    return {prefix + name for prefix in prefixes for name in (SPEC, "alpha", "index", "signs", "theta")} & keys


def fold_plan(unfolded_tensors: Mapping[str, Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    """From the key of each weight that needs folding to the function that folds it.

    Needs of a state dict only what `unfolded_keys` names, a few bytes a layer, so that large files can follow in turn.

    Raises:
        ValueError: for a spec that is damaged, or a residual or scale that is not whole.
    """
    how: dict[str, dict[str, Any]] = {}
    for key in unfolded_tensors:
        if match := SPEC_KEY.fullmatch(key):
            layer, kind, attached = match.groups()
            read = _scale_settings if kind == "scale" else _residual_settings
            settings = read(unfolded_tensors, key.removesuffix(SPEC))
            weight = f"{layer}up.weight" if attached is None else f"{attached}original"
            how.setdefault(weight, {"alpha": 0.0}).update(settings)
    return {weight: partial(_fold_named, weight, **settings) for weight, settings in how.items()}


def check_whole(plan: Iterable[str], keys: Iterable[str]) -> None:
    """Refuses a state dict with these keys that lacks a weight of its `fold_plan`.

    Raises:
        ValueError: naming the weight.
    """
    if orphans := set(plan) - set(keys):
        raise ValueError(f"this state dict has a residual or a scale but no {min(orphans)}: it is not whole")


def _residual_settings(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    settings = DuplicatedLatentResidual.decode(tensors[prefix + SPEC])
    if settings["alpha"] is None:
        settings["alpha"] = _required(tensors, prefix + "alpha", "residual")
    if settings["expansion"] == "random":
        settings["index"] = as_integers(prefix + "index", _required(tensors, prefix + "index", "residual"))
    if settings["signs"] == "random":
        settings["signs"] = as_integers(prefix + "signs", _required(tensors, prefix + "signs", "residual"))
    return settings


def _scale_settings(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    settings = LowRankScale.decode(tensors[prefix + SPEC])
    if settings["scale"] is None:
        settings["scale"] = tanh_scale(_required(tensors, prefix + "theta", "scale"))
    return settings


def _required(tensors: Mapping[str, Tensor], key: str, kind: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"this state dict has a {kind} but no {key}: it is not whole")
    return tensors[key]


def _fold_named(key: str, weight: Tensor, **how: Any) -> Tensor:
    try:
        return fold_weight(weight, **how)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


@torch.no_grad()
def fold_(model: nn.Module) -> FoldReport:
    """Folds each residual and scale of `model` into its up-projection, in place; afterwards none of them is left.

    Those of `LowRankLinear`s and those of `attach_residual_`, whose weights become plain parameters again. Under FSDP2
    every process calls it, and one layer at a time is gathered; there attached weights cannot be folded in place.

    Outputs change by rounding only. There is no way back; folding again does nothing. Optimizers keep their parameters,
    but what they remember belongs to the unfolded weights: fold after training.

    Returns:
        The report, with the rounding error of each layer.

    Raises:
        ValueError: naming the layer, where a weight or alpha is not finite, is offloaded or on the meta device; where
            an up-projection's weight is shared; and where something is on an up-projection that acts when it is called
            (an adapter, weight norm, pruning, hooks). The model is then unchanged.

    Example:
        >>> from foldrank import LowRankLinear, ResidualConfig
        >>> model = nn.Sequential(LowRankLinear(8, 6, 2, residual=ResidualConfig()))
        >>> len(fold_(model).errors), model[0].residual
        (1, None)
    """
    # Everything is checked before anything is changed.
    contents = inventory(model)
    foldables = list(_foldables(contents))
    for foldable in foldables:
        _check_foldable(foldable, contents)
    errors = {}
    for fold in foldables:
        weight = full_tensor(fold.weight)
        folded = fold.effective_weight(weight)
        errors[fold.name] = float((folded - fold.effective_weight(weight.double())).abs().max())
        fold.weight.copy_(distribute_like(folded, like=fold.weight))
        fold.finish()
    report = FoldReport(errors=errors)
    logger.info(report.summary())
    return report


@dataclass(frozen=True, slots=True)
class _Foldable:
    """One weight with its residual and scale, in a `LowRankLinear` or attached to another module."""

    name: str
    weight: nn.Parameter
    parameter_name: str
    parts: tuple[WeightParametrization, ...]
    effective_weight: Callable[[Tensor], Tensor]
    finish: Callable[[], None]


def _foldables(contents: Inventory) -> Iterator[_Foldable]:
    for name, layer in contents.low_rank_layers.items():
        if not layer.weight_parametrizations:
            continue
        prefix = f"{name}." if name else ""
        if problem := what_is_on(layer.up):
            raise ValueError(
                f"{prefix}up cannot be folded, because {problem}: the fold would change what it computes. Take it off "
                "first (merge the adapter, remove the hooks or the norm, load the weights), then fold"
            )
        for parameter_name, parameter in layer.named_parameters():
            _check_finite(prefix + parameter_name, parameter)
        finish = partial(_remove_parametrizations, layer)
        weight, parts = layer.up.weight, layer.weight_parametrizations
        yield _Foldable(name, weight, prefix + "up.weight", parts, layer.effective_weight, finish)
    for name, owner, attribute, residual in attached_residuals(contents):
        weight: Any = owner.get_parameter(f"parametrizations.{attribute}.original")
        _check_finite(name, weight)
        for parameter_name, parameter in residual.named_parameters():
            _check_finite(f"{parameter_name} of {name}", parameter)
        prefix, _, _ = name.rpartition(attribute)
        original = f"{prefix}parametrizations.{attribute}.original"
        yield _Foldable(name, weight, original, (residual,), residual, partial(detach, owner, attribute))


def _check_foldable(foldable: _Foldable, contents: Inventory) -> None:
    state = [tensor for part in foldable.parts for tensor in (*part.parameters(), *part.buffers())]
    if any(tensor.is_meta for tensor in state):
        raise ValueError(f"alpha, scale or index of {foldable.name} is offloaded or on the meta device: load it first")
    if others := contents.shared_with(foldable.weight, foldable.parameter_name):
        name = folded_key(foldable.parameter_name)
        raise ValueError(
            f"{name} is shared with another module ({', '.join(others)}), where the fold "
            "would change it too: fold the state dict (foldrank.fold_state_dict), in which each has a copy"
        )


def _remove_parametrizations(layer: LowRankLinear) -> None:
    for kind in PARAMETRIZATIONS:
        delattr(layer, kind)  # or an empty submodule would stay, and show in the repr
        setattr(layer, kind, None)


def _wide(number: float | Tensor) -> float | Tensor:
    if isinstance(number, Tensor):
        return full_tensor(number).to(at_least_float32(number.dtype))
    return number


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(f"{name} is offloaded or on the meta device: load it first")
    if not all_finite(full_tensor(tensor)):
        raise ValueError(f"{name} holds NaN or infinity: the training diverged; fold an earlier checkpoint")
