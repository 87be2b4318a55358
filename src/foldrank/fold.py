"""The fold: B* = B + c R in float32, rounded once. On a tensor, on a state dict, on a model. One way only."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foldrank.attach import attached_residuals, detach
from foldrank.config import Expansion
from foldrank.linear import LowRankLinear
from foldrank.residual import SPEC, DuplicatedLatentResidual, add_duplicates, decode_spec, expansion_index, scale
from foldrank.tree import low_rank_layers

logger = logging.getLogger(__name__)

RESIDUAL = "residual."
"""The part of a state dict's key between a low-rank layer's name and what belongs to its residual."""

ATTACHED = re.compile(r"(?P<owner>(?:.*\.)?)parametrizations\.(?P<own>[^.]+)\.(?P<rest>0\.spec|original)")
"""Keys of a weight to which `attach_residual_` gave a residual."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldReport:
    """What `fold_` did, per layer."""

    drift: Mapping[str, float]
    """From the name of a low-rank layer, or of an attached weight, to the largest rounding error of an entry of its
    B*, against the sum in float64."""

    @property
    def max_drift(self) -> float:
        """The largest rounding error of all layers; 0.0 where there was nothing to fold."""
        return max(self.drift.values(), default=0.0)

    def __str__(self) -> str:
        width = max((len(name) for name in self.drift), default=0)
        lines = [f"{name.ljust(width)}  {drift:.3e}" for name, drift in self.drift.items()]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line: how many layers, and the largest drift."""
        return f"folded {len(self.drift)} low-rank layers; largest rounding of a weight {self.max_drift:.3e}"


def fold_weight(
    weight: Tensor,
    *,
    alpha: float | Tensor = 1.0,
    expansion: Expansion = "contiguous",
    variance_correction: bool = True,
    index: Tensor | None = None,
    latent_dim: int = 1,
) -> Tensor:
    """The folded up-projection B* = B + alpha / sqrt(K) R, summed in float32 (or wider) and rounded once.

    Args:
        weight: B, unchanged.
        alpha: strength of the residual.
        expansion: which latent each output repeats; for `random` give `index`.
        variance_correction: divide alpha by sqrt(K), K = ceil(d_out / r).
        index: the latent of each output, in place of the expansion's own.
        latent_dim: the dimension of `weight` that counts the latents: 1 for (d_out, r), 0 for (r, d_out).

    Shape:
        (d_out, r), or (r, d_out) with `latent_dim=0`; index (d_out,); the result is shaped as `weight`.

    Raises:
        ValueError: for a weight or alpha that is not finite, a weight that is not a matrix, an index of another length.

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
    unit = scale(1.0, out_features, rank, variance_correction=variance_correction)
    _check_finite("alpha", torch.as_tensor(alpha))
    if isinstance(alpha, Tensor):
        alpha = alpha.to(torch.promote_types(alpha.dtype, torch.float32))
    return add_duplicates(weight, index, alpha * unit, latent_dim)


def fold_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the folded model, without a model: each `up.weight` and each attached weight folded, all of the
    residual left out. An attached weight goes back to the name that it had (`parametrizations.W.original` to `W`).

    Tensors that need no fold are passed on as they are. Folding a folded state dict changes nothing.

    Raises:
        ValueError: for a weight or alpha that is not finite, a spec that is damaged, or a residual that is not whole.
    """
    plan = fold_plan(state_dict)
    if orphans := plan.keys() - state_dict.keys():
        raise ValueError(f"this state dict has a residual but no {sorted(orphans)[0]}: it is not whole")
    dropped = residual_keys(state_dict)
    return {
        folded_key(key) if key in plan else key: plan[key](value) if key in plan else value
        for key, value in state_dict.items()
        if key not in dropped
    }


def folded_key(key: str) -> str:
    """The key of a weight that `fold_plan` names, once it is folded."""
    return ATTACHED.sub(r"\g<owner>\g<own>", key)


def residual_keys(keys: Iterable[str]) -> set[str]:
    """Those of a state dict's keys that belong to residuals; a folded state dict has none."""
    keys = set(keys)
    specs = [key for key in keys if key.endswith(SPEC) and (key.endswith(RESIDUAL + SPEC) or ATTACHED.fullmatch(key))]
    prefixes = [key.removesuffix(SPEC) for key in specs]
    return {prefix + name for prefix in prefixes for name in (SPEC, "alpha", "index")} & keys


def fold_plan(residual_tensors: Mapping[str, Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    """From the key of each weight that needs folding to the function that folds it.

    Needs of a state dict only what `residual_keys` names, a few bytes a layer, so that large files can follow in turn.

    Raises:
        ValueError: for a spec that is damaged, or a residual that is not whole.
    """
    plan: dict[str, Callable[[Tensor], Tensor]] = {}
    for key in residual_keys(residual_tensors):
        if not key.endswith(SPEC):
            continue
        prefix = key.removesuffix(SPEC)
        spec = decode_spec(residual_tensors[key])
        needed = {"alpha"} if spec["alpha"] is None else set()
        needed |= {"index"} if spec["expansion"] == "random" else set()
        if missing := {prefix + name for name in needed} - residual_tensors.keys():
            raise ValueError(f"this state dict has a residual but no {min(missing)}: it is not whole")
        attached = ATTACHED.fullmatch(key)
        weight = prefix.removesuffix("0.") + "original" if attached else prefix.removesuffix(RESIDUAL) + "up.weight"
        plan[weight] = partial(
            _fold_named,
            weight,
            alpha=residual_tensors[prefix + "alpha"] if spec["alpha"] is None else spec["alpha"],
            expansion=spec["expansion"],
            variance_correction=spec["variance_correction"],
            index=residual_tensors.get(prefix + "index"),
            latent_dim=spec["latent_dim"],
        )
    return plan


def _fold_named(key: str, weight: Tensor, **how: Any) -> Tensor:
    try:
        return fold_weight(weight, **how)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


@torch.no_grad()
def fold_(model: nn.Module) -> FoldReport:
    """Folds each residual of `model` into its up-projection, in place; afterwards no residual object is left.

    Residuals of `LowRankLinear`s and those of `attach_residual_`, whose weights become plain parameters again.

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
        weight, residual = fold.weight, fold.residual
        exact = add_duplicates(weight.double(), residual.latent_index(weight.device), residual.c(), residual.latent_dim)
        weight.copy_(residual(weight))
        drift[fold.name] = float((weight - exact).abs().max())
        fold.remove_residual()
    report = FoldReport(drift=drift)
    logger.info(report.summary())
    return report


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fold:
    name: str
    weight: Tensor
    weight_name: str
    residual: DuplicatedLatentResidual
    remove_residual: Callable[[], None]


def _planned_folds(model: nn.Module) -> list[_Fold]:
    """What to fold, both kinds; raises before anything is touched."""
    folds = []
    for name, layer in low_rank_layers(model).items():
        if layer.residual is None:
            continue
        for parameter_name, parameter in layer.named_parameters():
            _check_finite(f"{name}.{parameter_name}", parameter)
        folds.append(
            _Fold(
                name=name,
                weight=layer.up.weight,
                weight_name=f"{name}.up.weight",
                residual=layer.residual,
                remove_residual=partial(_remove_residual, layer),
            )
        )
    for name, owner, own, residual in attached_residuals(model):
        weight = owner.get_parameter(f"parametrizations.{own}.original")
        _check_finite(name, weight)
        for parameter_name, parameter in residual.named_parameters():
            _check_finite(f"{parameter_name} of {name}", parameter)
        remove = partial(detach, owner, own)
        folds.append(_Fold(name=name, weight=weight, weight_name=name, residual=residual, remove_residual=remove))
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


def _remove_residual(layer: LowRankLinear) -> None:
    del layer.residual  # or the empty place of a submodule would stay, and show in the repr
    layer.residual = None


def _check_finite(name: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or infinity: the training diverged; fold an earlier checkpoint")
