"""The residual on low-rank layers that someone else wrote: on a weight, by its name, whatever module holds it.

`torch.nn.utils.parametrize` computes the weight anew at each use. The layer's attribute code and class need no change.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized, register_parametrization

from foldrank.core.attached import parametrizations
from foldrank.core.config import ResidualConfig, matches
from foldrank.core.formatting import abbreviate, table
from foldrank.core.inventory import check_patterns, inventory
from foldrank.core.linear import LowRankLinear
from foldrank.core.parametrization import SPEC, check_same_state
from foldrank.core.residual import DuplicatedLatentResidual

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttachedWeight:
    """One weight that `attach_residual_` gave a residual."""

    name: str
    out_features: int
    rank: int
    alpha: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AttachReport:
    """What `attach_residual_` did: weights that have a residual now, and those it left with the reason.

    Example:
        >>> layer = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 16, bias=False))
        >>> report = attach_residual_(layer, ["1.weight"], ResidualConfig())
        >>> len(report.attached), dict(report.skipped)
        (1, {})
    """

    attached: tuple[AttachedWeight, ...]
    skipped: Mapping[str, str]
    """From the name of a parameter that `names` matches and that got no residual to the reason."""

    def __str__(self) -> str:
        rows = [(row.name, f"{row.rank} -> {row.out_features}", f"{row.alpha:g}") for row in self.attached]
        rows += [(name, "skipped", reason) for name, reason in self.skipped.items()]
        return table(("weight", "shape", "alpha"), rows) + "\n" + self.summary()

    def summary(self) -> str:
        """One line: how many weights, and which were skipped."""
        total = len(self.attached) + len(self.skipped)
        skipped = f", skipped {abbreviate(self.skipped)}" if self.skipped else ""
        return f"gave {len(self.attached)} of {total} weights a residual{skipped}"


def attach_residual_(
    model: nn.Module, names: str | Sequence[str], config: ResidualConfig, latent_dim: int = 1
) -> AttachReport:
    """Adds the residual to up-projections that `model` already has, in place.

    A weight B then reads as B + c R wherever the model's code uses it; the parameter stays the same object and keeps
    its value, under `<module>.parametrizations.<weight>.original`. Initialise and load plain weights first: an
    initialiser that is given an attached weight by its attribute name would write to a copy; give it that `original`.
    `fold_` makes it a plain parameter again. Until then the model can be copied and compiled, and saved by its state
    dict, but not pickled.

    Args:
        model: any module.
        names: names of parameters, or patterns for them (`foldrank.core.config`), such as "cola_b" or
            ".*lora_B.weight".
        config: the residual; its scope and a table of alphas are matched with the names of the parameters as well.
        latent_dim: the dimension of the weights that counts the latents: 1 for (d_out, r), 0 for (r, d_out).

    Returns:
        The report; `print(report)` is a table.

    Raises:
        ValueError: for a pattern that matches no weight which can have a residual (a matrix, not parametrized, not
            shared, not in a `LowRankLinear`), or a matrix whose rank would be above d_out. The model is then unchanged.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 4, bias=False), nn.SiLU(), nn.Linear(4, 16))
        >>> attach_residual_(model, "2.weight", ResidualConfig(alpha=1.0)).summary()
        'gave 1 of 1 weights a residual'
    """
    plan, skipped = _plan(model, [names] if isinstance(names, str) else names, config, latent_dim)
    for owner, attribute, residual in plan.values():
        register_parametrization(owner, attribute, residual)
        owner.register_load_state_dict_pre_hook(partial(_check_loading, attribute))
    report = AttachReport(
        attached=tuple(
            AttachedWeight(name=name, out_features=residual.out_features, rank=residual.rank, alpha=residual.start)
            for name, (_, _, residual) in plan.items()
        ),
        skipped=skipped,
    )
    logger.info(report.summary())
    return report


def _plan(
    model: nn.Module, patterns: Sequence[str], config: ResidualConfig, latent_dim: int
) -> tuple[dict[str, tuple[nn.Module, str, DuplicatedLatentResidual]], dict[str, str]]:
    """The residuals to attach and what to skip for which reason; raises before anything is touched."""
    if latent_dim not in (0, 1):
        raise ValueError(f"latent_dim must be 1 for weights (d_out, r) or 0 for (r, d_out), got {latent_dim!r}")
    if not patterns:
        raise ValueError("names is empty: name the parameters that get a residual")
    matrices, others = _matrices(model)
    check_patterns("names", patterns, matrices, what="weight that can have a residual", others=others)

    def named(name: str) -> bool:
        return any(matches(pattern, name) for pattern in patterns)

    skipped = {name: reason for name, reason in others.items() if named(name)}
    chosen = {name: matrix for name, matrix in matrices.items() if named(name)}
    check_patterns("config.scope", config.scope_patterns, chosen, what="named weight")
    if isinstance(config.alpha, Mapping):
        check_patterns("config.alpha", config.alpha, chosen, what="named weight")
    plan = {}
    for name, (owner, attribute, weight) in chosen.items():
        rank, out_features = weight.shape[latent_dim], weight.shape[1 - latent_dim]
        if rank > out_features:
            raise ValueError(
                f"{name} {tuple(weight.shape)} would have rank {rank} above d_out {out_features} with latent_dim="
                f"{latent_dim}: is it stored the other way round (latent_dim={1 - latent_dim}), or no up-projection?"
            )
        mine = config.for_layer(name)
        if mine is None:
            skipped[name] = "outside of the residual's scope, or not in its table of alphas"
            continue
        residual = DuplicatedLatentResidual(
            out_features, rank, mine, name=name, latent_dim=latent_dim, device=weight.device, dtype=weight.dtype
        )
        plan[name] = owner, attribute, residual
    if not plan:
        raise ValueError("config: scope and alpha together name none of these weights")
    return plan, skipped


def _matrices(model: nn.Module) -> tuple[dict[str, tuple[nn.Module, str, nn.Parameter]], dict[str, str]]:
    """The parameters that can have a residual, and the others with the reason."""
    contents = inventory(model)
    matrices, others = {}, {}
    for name, owner in contents.modules.items():
        prefix = f"{name}." if name else ""
        if isinstance(owner, LowRankLinear):
            reason = "it is in a LowRankLinear: give factorize_ a config with this residual"
            others |= {prefix + parameter: reason for parameter, _ in owner.named_parameters()}
            continue
        if isinstance(owner, ParametrizationList):
            continue
        others |= {prefix + attribute: "it is already parametrized" for attribute in parametrizations(owner)}
        for attribute, parameter in owner.named_parameters(recurse=False):
            if parameter.dim() != 2 or not parameter.is_floating_point():
                others[prefix + attribute] = f"{parameter.dtype} {tuple(parameter.shape)} is no matrix of real numbers"
            elif contents.shared_with(parameter, prefix + attribute):
                others[prefix + attribute] = "it is shared with another module, which would go without the residual"
            else:
                matrices[prefix + attribute] = owner, attribute, parameter
    return matrices, others


def _check_loading(attribute: str, owner: nn.Module, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
    """A hook before loading, which stays on after the fold."""
    here = is_parametrized(owner, attribute)
    there = f"{prefix}parametrizations.{attribute}.0.{SPEC}" in state_dict
    weight, present = prefix + attribute, prefix + attribute in state_dict
    others[-1].extend(check_same_state(weight, "residual", here=here, there=there, folded_there=present))
