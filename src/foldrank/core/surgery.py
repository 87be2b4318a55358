"""Model surgery: which linear layers a config means, and their replacement. Plans first, checks all, then mutates."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from foldrank.core import backbones
from foldrank.core.config import LowRankConfig, ResidualConfig, lookup, matches
from foldrank.core.formatting import abbreviate, table
from foldrank.core.inventory import (
    LinearSpec,
    blocks,
    check_patterns,
    count_parameters,
    linear_spec,
    low_rank_layers,
    parameter_owners,
    unconvertible_weights,
    walk,
)
from foldrank.core.linear import LowRankLinear
from foldrank.core.ranks import solve_ranks

logger = logging.getLogger(__name__)

HEADS = ("lm_head", "embed_out", "head", "classifier", "score")
"""Names of output heads, for models that have no `get_output_embeddings`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertedLayer:
    """One layer that `factorize_` replaced."""

    name: str
    in_features: int
    out_features: int
    rank: int
    residual: bool
    params_before: int
    params_after: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FactorizeReport:
    """What `factorize_` did: layers converted, layers skipped with the reason, parameters of the model."""

    converted: tuple[ConvertedLayer, ...]
    skipped: Mapping[str, str]
    """From the name of a linear layer that stayed dense to the reason."""
    params_before: int
    params_after: int

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                f"{layer.in_features} -> {layer.out_features}",
                str(layer.rank),
                "yes" if layer.residual else "no",
                f"{layer.params_before:,} -> {layer.params_after:,}",
            )
            for layer in self.converted
        ]
        rows += [(name, "dense", "", "", reason) for name, reason in self.skipped.items()]
        return table(("layer", "shape", "rank", "residual", "parameters"), rows) + "\n" + self.summary()

    def summary(self) -> str:
        """One line: how many layers, which were skipped, parameters before and after."""
        total = len(self.converted) + len(self.skipped)
        skipped = f", skipped {abbreviate(self.skipped)}" if self.skipped else ""
        return (
            f"converted {len(self.converted)} of {total} linear layers{skipped}; "
            f"{self.params_before:,} -> {self.params_after:,} parameters"
        )


def factorize_(model: nn.Module, config: LowRankConfig) -> FactorizeReport:
    """Replaces the linear layers that `config` targets by low-rank ones of its backbone, in place.

    The new factors are drawn afresh, as the backbone does it, on the device and in the dtype of the layer they replace;
    a bias is kept as a parameter and drawn afresh as well. This is pre-training: the dense weights are dropped.

    Args:
        model: any module that holds `nn.Linear`s, or transformers' `Conv1D`s.
        config: ranks, activation, targets, residual.

    Returns:
        The report; `print(report)` is a table.

    Raises:
        ValueError: for a pattern that matches no linear layer, a rank that does not fit a layer, a model that is
            already low-rank, or one that is itself a linear layer. The model is then unchanged.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        >>> factorize_(model, LowRankConfig(rank=2, residual=ResidualConfig())).summary()
        'converted 2 of 2 linear layers; 1,072 -> 240 parameters'
    """
    plan, skipped = _plan(model, config)
    params_before = count_parameters(model)
    converted = []
    for name, planned in plan.items():
        linear = planned.linear
        # What a backbone refuses are its settings, at the first layer: nothing is replaced then.
        layer = backbones.build(
            config,
            linear.in_features,
            linear.out_features,
            planned.rank,
            bias=linear.bias,
            residual=planned.residual,
            name=name,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        ).train(linear.module.training)
        for parent, attribute in planned.homes:
            setattr(parent, attribute, layer)
        converted.append(
            ConvertedLayer(
                name=name,
                in_features=linear.in_features,
                out_features=linear.out_features,
                rank=planned.rank,
                residual=planned.residual is not None,
                params_before=count_parameters(linear.module),
                params_after=count_parameters(layer),
            )
        )
    _leave_fast_paths(model)
    report = FactorizeReport(
        converted=tuple(converted),
        skipped=skipped,
        params_before=params_before,
        params_after=count_parameters(model),
    )
    logger.info(report.summary())
    return report


def describe(model: nn.Module) -> LowRankConfig | None:
    """The config that rebuilds the low-rank layers of `model` as they are now, by exact names; None if it has none.

    Raises:
        ValueError: where the layers differ in backbone, activation, scale or expansion, which one config cannot say.
    """
    layers = low_rank_layers(model)
    if not layers:
        return None
    settings = [backbones.settings_of(layer) for layer in layers.values()]
    residuals = {name: layer.residual.config for name, layer in layers.items() if layer.residual is not None}
    kinds = {replace(residual, alpha=1.0, scope="all") for residual in residuals.values()}
    if any(other != settings[0] for other in settings) or len(kinds) > 1:
        raise ValueError(
            "the low-rank layers of this model differ in backbone, activation, scale or expansion: "
            "no one config says that"
        )
    linears = [name for name, module, _ in walk(model) if isinstance(module, LowRankLinear) or linear_spec(module)]
    # Dense layers that the name of a low-rank one would match as a tail.
    dense = [name for name in linears if name not in layers]
    exclude = tuple(_exact(name, linears) for name in dense if any(matches(other, name) for other in layers))
    residual = None
    if residuals:
        alphas = {_exact(name, linears): residual.alpha for name, residual in residuals.items()}
        uniform = len(residuals) == len(layers) and len(set(alphas.values())) == 1
        residual = replace(kinds.pop(), alpha=next(iter(alphas.values())) if uniform else alphas)
    return LowRankConfig(
        rank={name: layer.rank for name, layer in layers.items()},
        exclude=exclude,
        residual=residual,
        **settings[0],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Planned:
    linear: LinearSpec
    homes: tuple[tuple[nn.Module, str], ...]
    rank: int
    residual: ResidualConfig | None


def _plan(model: nn.Module, config: LowRankConfig) -> tuple[dict[str, _Planned], dict[str, str]]:
    """What to replace and what to skip for which reason; raises before anything is touched."""
    modules = {name: (module, homes) for name, module, homes in walk(model)}
    if linear_spec(model):
        raise ValueError("the model is itself a linear layer and cannot be replaced in place: build a LowRankLinear")
    if present := low_rank_layers(model):
        raise ValueError(f"the model is already low-rank: {abbreviate(present)}")
    linears = {name: dense for name, (module, _) in modules.items() if (dense := linear_spec(module))}
    if not linears:
        raise ValueError(f"the model ({type(model).__name__}) has no nn.Linear (nor Conv1D) to convert")
    loose = unconvertible_weights(model)
    targets = tuple(config.rank) if isinstance(config.rank, Mapping) and config.targets is None else config.targets
    check_patterns("targets", targets or (), linears, others=loose)
    check_patterns("exclude", config.exclude, linears, others=loose)

    chosen, skipped = {}, {}
    head = _output_head(model)
    tied = parameter_owners(model)
    for name, linear in linears.items():
        if targets is not None and not any(matches(pattern, name) for pattern in targets):
            skipped[name] = "not a target"
        elif any(matches(pattern, name) for pattern in config.exclude):
            skipped[name] = "excluded"
        elif linear.module._parameters.get("weight") is not linear.weight:
            skipped[name] = "its weight is computed from others (parametrized, normalised or pruned)"
        elif isinstance(linear.module, nn.Linear) and type(linear.module) is not nn.Linear:
            skipped[name] = f"a {type(linear.module).__name__}, whose owner may use its weight without calling it"
        elif others := tied.get(id(linear.weight), set()) - {name}:
            skipped[name] = f"its weight is shared with {abbreviate(others)}"
        elif targets is None and (linear.module is head or name.rpartition(".")[2] in HEADS):
            skipped[name] = "output head"
        else:
            chosen[name] = linear
    if config.dense_first or config.dense_last:
        skipped |= _dense_blocks(model, config, chosen)
        chosen = {name: linear for name, linear in chosen.items() if name not in skipped}
    if not chosen:
        reasons = {reason: [name for name in skipped if skipped[name] == reason] for reason in skipped.values()}
        raise ValueError(
            "nothing to convert: " + "; ".join(f"{abbreviate(reasons[reason])}: {reason}" for reason in reasons)
        )
    order = list(linears)
    skipped = dict(sorted(skipped.items(), key=lambda item: order.index(item[0]))) | loose

    ranks = _ranks(model, config, chosen)
    residuals: dict[str, ResidualConfig | None] = dict.fromkeys(chosen)
    if config.residual is not None:
        check_patterns("residual.scope", config.residual.scope_patterns, chosen)
        if isinstance(config.residual.alpha, Mapping):
            check_patterns("residual.alpha", config.residual.alpha, chosen)
        residuals = {name: config.residual.for_layer(name) for name in chosen}
        if not any(residuals.values()):
            raise ValueError("residual: scope and alpha together name no layer that is converted")
    plan = {
        name: _Planned(linear=linear, homes=modules[name][1], rank=ranks[name], residual=residuals[name])
        for name, linear in chosen.items()
    }
    return plan, skipped


def _ranks(model: nn.Module, config: LowRankConfig, chosen: Mapping[str, LinearSpec]) -> dict[str, int]:
    if config.rank is None:
        assert config.budget is not None
        total = count_parameters(model)
        shapes = {name: (linear.in_features, linear.out_features) for name, linear in chosen.items()}
        backbone = backbones.class_of(config)
        kept = total - sum(linear.weight.numel() for linear in chosen.values())
        kept += sum(backbone.num_extra_params(*shape, **config.extra_config) for shape in shapes.values())
        return solve_ranks(shapes, budget=config.budget, total=total, kept=kept)
    ranks = {name: _rank(lookup(config.rank, name), name, linear) for name, linear in chosen.items()}
    if isinstance(config.rank, Mapping):
        check_patterns("rank", config.rank, chosen)
    return ranks


def _rank(wanted: int | float | None, name: str, linear: LinearSpec) -> int:
    smaller_side = min(linear.in_features, linear.out_features)
    if wanted is None:
        raise ValueError(f"rank: the table has no entry for {name}, which is a target")
    number = max(1, round(wanted * smaller_side)) if isinstance(wanted, float) else wanted
    if number > smaller_side:
        raise ValueError(
            f"rank {number} is above the full rank {smaller_side} of {name} ({linear.in_features} -> "
            f"{linear.out_features}): give a smaller rank, a fraction, or a table by pattern, or exclude this layer"
        )
    return number


def _dense_blocks(model: nn.Module, config: LowRankConfig, targeted: Iterable[str]) -> dict[str, str]:
    """The targeted layers in the first and last blocks, with the reason why they stay dense."""
    name, held = blocks(model, targeted)
    if not held:
        raise ValueError("dense_first, dense_last: no nn.ModuleList here holds targets, as blocks would: use exclude")
    if config.dense_first + config.dense_last >= len(held):
        raise ValueError(
            f"dense_first {config.dense_first} and dense_last {config.dense_last} leave none of the {len(held)} blocks "
            f"of {name} to convert"
        )
    first, last = held[: config.dense_first], held[len(held) - config.dense_last :]
    return {
        layer: f"in a block of {name} that stays dense ({field})"
        for field, dense in (("dense_first", first), ("dense_last", last))
        for layers in dense
        for layer in layers
    }


def _leave_fast_paths(model: nn.Module) -> None:
    """In eval mode torch's own encoder reads `linear1.weight` where it may; here it must call the layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and low_rank_layers(module):
            module.activation_relu_or_gelu = 0  # neither ReLU nor GELU: the fast path is for these alone
        if isinstance(module, nn.TransformerEncoder) and low_rank_layers(module):
            module.use_nested_tensor = False


def _exact(name: str, names: Iterable[str]) -> str:
    """A pattern that matches `name` and no other of `names`: the name itself where that will do."""
    return name if not any(matches(name, other) for other in names if other != name) else f"^{re.escape(name)}$"


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None
