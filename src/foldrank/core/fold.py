"""The fold: B* = s (B + c R) in float32, rounded once. On a tensor, on a state dict, on a model. One way only."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foldrank.core.attach import attached_residuals, detach
from foldrank.core.config import Expansion
from foldrank.core.dtensor import distribute_like, full_tensor
from foldrank.core.functional import map_weight
from foldrank.core.inventory import low_rank_layers
from foldrank.core.linear import MAPS, LowRankLinear
from foldrank.core.parametrization import SPEC
from foldrank.core.residual import DuplicatedLatentResidual, add_duplicates, expansion_index
from foldrank.core.residual import scale as residual_factor
from foldrank.core.scale import LowRankScale, squash

logger = logging.getLogger(__name__)

SPEC_KEY = re.compile(rf"(?P<layer>(?:.*\.)?)(?P<kind>{'|'.join(MAPS)})\.{SPEC}")
"""Keys that say how to fold a low-rank layer."""

ATTACHED = re.compile(r"(?P<owner>(?:.*\.)?)parametrizations\.(?P<own>[^.]+)\.original")
ATTACHED_SPEC = re.compile(rf"(?P<weight>(?:.*\.)?parametrizations\.[^.]+\.)0\.{SPEC}")
"""Keys of a weight to which `attach_residual_` gave a residual, and of what says how to fold it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldReport:
    """What `fold_` did, per layer."""

    drift: Mapping[str, float]
    """From the name of a low-rank layer, or of an attached weight, to the largest rounding error of an entry of its
    B*, against the sum in float64."""

    @property
    def max_abs_error(self) -> float:
        """The largest rounding error of all layers; 0.0 where there was nothing to fold."""
        return max(self.drift.values(), default=0.0)

    def __str__(self) -> str:
        width = max((len(name) for name in self.drift), default=0)
        lines = [f"{name.ljust(width)}  {drift:.3e}" for name, drift in self.drift.items()]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line: how many layers, and the largest drift."""
        return f"folded {len(self.drift)} low-rank layers; largest rounding of a weight {self.max_abs_error:.3e}"


def fold_weight(
    weight: Tensor,
    *,
    alpha: float | Tensor = 1.0,
    expansion: Expansion = "contiguous",
    variance_correction: bool = True,
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
        index: the latent of each output, in place of the expansion's own.
        scale: the low-rank scale s.
        latent_dim: the dimension of `weight` that counts the latents: 1 for (d_out, r), 0 for (r, d_out).

    Shape:
        (d_out, r), or (r, d_out) with `latent_dim=0`; index (d_out,); the result is shaped as `weight`.

    Raises:
        ValueError: for a weight, alpha or scale that is not finite, a weight that is no matrix, an index of another
            length.

    Example:
        >>> fold_weight(torch.zeros(4, 1), alpha=3.0).flatten().tolist()
        [1.5, 1.5, 1.5, 1.5]
    """
    if weight.dim() != 2 or latent_dim not in (0, 1):
        raise ValueError(
            f"fold_weight takes a matrix and latent_dim 0 or 1, got {tuple(weight.shape)} and {latent_dim}"
        )
    _check_finite("weight", weight)
    out_features, rank = weight.shape[1 - latent_dim], weight.shape[latent_dim]
    if index is None:
        index = expansion_index(expansion, out_features, rank, device=weight.device)
    elif index.shape != (out_features,):
        raise ValueError(f"index must hold one latent for each of {out_features} outputs, got {tuple(index.shape)}")
    _check_finite("alpha", torch.as_tensor(alpha))
    _check_finite("scale", torch.as_tensor(scale))
    c = _wide(alpha) * residual_factor(1.0, out_features, rank, variance_correction=variance_correction)
    wide = full_tensor(weight).to(torch.promote_types(weight.dtype, torch.float32))
    folded = add_duplicates(wide, index, c, latent_dim)
    if not isinstance(scale, float) or scale != 1.0:  # or a checkpoint would take one more pass over each weight
        folded = folded * _wide(scale)
    return distribute_like(folded.to(weight.dtype), like=weight)


def fold_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the folded model, without a model: each `up.weight` and each attached weight folded, residuals
    and scales left out. An attached weight goes back to the name that it had (`parametrizations.W.original` to `W`).

    Tensors that need no fold are passed on as they are. Folding a folded state dict changes nothing.

    Raises:
        ValueError: for a weight or alpha that is not finite, a spec that is damaged, or a residual that is not whole.
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
    return ATTACHED.sub(r"\g<owner>\g<own>", key)


def unfolded_keys(keys: Iterable[str]) -> set[str]:
    """Those of a state dict's keys that belong to residuals and scales; a folded state dict has none."""
    keys = set(keys)
    prefixes = [key.removesuffix(SPEC) for key in keys if SPEC_KEY.fullmatch(key) or ATTACHED_SPEC.fullmatch(key)]
    return {prefix + name for prefix in prefixes for name in (SPEC, "alpha", "index", "theta")} & keys


def fold_plan(unfolded_tensors: Mapping[str, Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    """From the key of each weight that needs folding to the function that folds it.

    Needs of a state dict only what `unfolded_keys` names, a few bytes a layer, so that large files can follow in turn.

    Raises:
        ValueError: for a spec that is damaged, or a residual or scale that is not whole.
    """
    how: dict[str, dict[str, Any]] = {}
    for key in unfolded_tensors:
        if match := ATTACHED_SPEC.fullmatch(key):
            how[match["weight"] + "original"] = _residual_settings(unfolded_tensors, key.removesuffix(SPEC))
        elif match := SPEC_KEY.fullmatch(key):
            read = _residual_settings if match["kind"] == "residual" else _scale_settings
            found = read(unfolded_tensors, key.removesuffix(SPEC))
            how.setdefault(match["layer"] + "up.weight", {"alpha": 0.0}).update(found)
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
        settings["alpha"] = _held(tensors, prefix + "alpha", "residual")
    if settings["expansion"] == "random":
        settings["index"] = _held(tensors, prefix + "index", "residual")
    return settings


def _scale_settings(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    settings = LowRankScale.decode(tensors[prefix + SPEC])
    if settings["scale"] is None:
        settings["scale"] = squash(_held(tensors, prefix + "theta", "scale"))
    return settings


def _held(tensors: Mapping[str, Tensor], key: str, kind: str) -> Tensor:
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
        The report, with the rounding per layer.

    Raises:
        ValueError: where a weight or alpha is not finite, or an up-projection's weight is shared, naming the layer; the
            model is then unchanged.

    Example:
        >>> from foldrank import LowRankLinear, ResidualConfig
        >>> model = nn.Sequential(LowRankLinear(8, 6, 2, residual=ResidualConfig()))
        >>> len(fold_(model).drift), model[0].residual
        (1, None)
    """
    folds = _planned_folds(model)
    drift = {}
    for fold in folds:
        weight = full_tensor(fold.weight)
        mapped = fold.mapped(weight)
        drift[fold.name] = float((mapped - fold.mapped(weight.double())).abs().max())
        fold.weight.copy_(distribute_like(mapped, like=fold.weight))
        fold.finish()
    report = FoldReport(drift=drift)
    logger.info(report.summary())
    return report


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fold:
    name: str
    weight: Tensor
    weight_name: str
    mapped: Callable[[Tensor], Tensor]
    finish: Callable[[], None]


def _mapped(layer: LowRankLinear, weight: Tensor) -> Tensor:
    return map_weight(weight, layer.up_map(weight))


def _planned_folds(model: nn.Module) -> list[_Fold]:
    """What to fold, both kinds; raises before anything is touched."""
    folds = []
    for name, layer in low_rank_layers(model).items():
        if not layer.maps:
            continue
        for parameter_name, parameter in layer.named_parameters():
            _check_finite(f"{name}.{parameter_name}", parameter)
        folds.append(
            _Fold(
                name=name,
                weight=layer.up.weight,
                weight_name=f"{name}.up.weight",
                mapped=partial(_mapped, layer),
                finish=partial(_remove_maps, layer),
            )
        )
    for name, owner, own, residual in attached_residuals(model):
        weight = owner.get_parameter(f"parametrizations.{own}.original")
        _check_finite(name, weight)
        for parameter_name, parameter in residual.named_parameters():
            _check_finite(f"{parameter_name} of {name}", parameter)
        finish = partial(detach, owner, own)
        folds.append(_Fold(name=name, weight=weight, weight_name=name, mapped=residual, finish=finish))
    homes = Counter(
        id(parameter)
        for parent in model.modules()
        for child in parent.children()
        for parameter in child.parameters(recurse=False)
    )
    for fold in folds:
        if homes[id(fold.weight)] > 1:
            raise ValueError(
                f"{fold.weight_name} is shared with another module, which the fold would change too: "
                "fold the state dict (foldrank.fold_state_dict), in which each has its own"
            )
    return folds


def _remove_maps(layer: LowRankLinear) -> None:
    for kind in MAPS:
        delattr(layer, kind)  # or the empty place of a submodule would stay, and show in the repr
        setattr(layer, kind, None)


def _wide(number: float | Tensor) -> float | Tensor:
    if isinstance(number, Tensor):
        return full_tensor(number).to(torch.promote_types(number.dtype, torch.float32))
    return number


def _check_finite(name: str, tensor: Tensor) -> None:
    extremes = torch.aminmax(full_tensor(tensor)) if tensor.numel() else ()  # NaN is the extreme of all that holds one
    if not all(map(torch.isfinite, extremes)):  # isfinite of all entries takes ten times as long on a CPU
        raise ValueError(f"{name} holds NaN or infinity: the training diverged; fold an earlier checkpoint")
