"""Model surgery: which linear layers a config means, and their replacement. Plans first, checks all, then mutates."""

import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from foldrank.config import Activation, LowRankConfig, ResidualConfig, lookup, matches
from foldrank.linear import LowRankLinear

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
        header = ("layer", "shape", "rank", "residual", "parameters")
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]
        ]
        lines.append(self.summary())
        return "\n".join(line.rstrip() for line in lines)

    def summary(self) -> str:
        """One line: how many layers, which were skipped, parameters before and after."""
        total = len(self.converted) + len(self.skipped)
        skipped = f", skipped {_some(self.skipped)}" if self.skipped else ""
        return (
            f"converted {len(self.converted)} of {total} linear layers{skipped}; "
            f"{self.params_before:,} -> {self.params_after:,} parameters"
        )


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[tuple[nn.Module, str], ...]]]:
    """The one tree walker: each module once, under its first name, with every (parent, attribute) that holds it.

    The factors inside a low-rank layer belong to it and are not visited.
    """
    homes: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():  # named_children() leaves out a child's second name
            if child is not None:
                homes.setdefault(id(child), []).append((parent, attribute))
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if isinstance(module, LowRankLinear):
            inside.update(id(child) for child in module.modules() if child is not module)
        yield name, module, tuple(homes.get(id(module), ()))


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseLayer:
    """A layer that computes x W + b, as surgery sees it: an `nn.Linear`, or transformers' `Conv1D` (GPT-2)."""

    module: nn.Module
    weight: Tensor
    in_features: int
    out_features: int
    bias: bool


def as_dense(module: nn.Module) -> DenseLayer | None:
    """`module` as a dense layer; None where it is none."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(module, nn.Linear):
        in_features, out_features = module.in_features, module.out_features
    # By name and shape, because the core imports torch alone. Its weight is (in, out); it is called as a Linear is.
    elif type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2:
        in_features, out_features = weight.shape
        if (getattr(module, "nx", None), getattr(module, "nf", None)) != (in_features, out_features):
            return None
    else:
        return None
    assert isinstance(weight, Tensor)
    return DenseLayer(
        module=module, weight=weight, in_features=in_features, out_features=out_features, bias=bias is not None
    )


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The low-rank layers of `model` by name."""
    return {name: module for name, module, _ in walk(model) if isinstance(module, LowRankLinear)}


def factorize_(model: nn.Module, config: LowRankConfig) -> FactorizeReport:
    """Replaces the linear layers that `config` targets by `LowRankLinear`s, in place.

    The new factors are drawn afresh (CoLA's initialisation), on the device and in the dtype of the layer they replace;
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
        layer = LowRankLinear(
            linear.in_features,
            linear.out_features,
            planned.rank,
            activation=config.activation,
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
        ValueError: where the layers differ in activation or in their residual, which one config cannot say.
    """
    layers = low_rank_layers(model)
    if not layers:
        return None
    activations: set[Activation | None] = {layer.activation_name for layer in layers.values()}
    residuals = {name: layer.residual.config for name, layer in layers.items() if layer.residual is not None}
    kinds = {replace(residual, alpha=1.0, scope="all") for residual in residuals.values()}
    if len(activations) > 1 or len(kinds) > 1:
        raise ValueError("the low-rank layers of this model differ in activation or expansion: no one config says that")
    linears = [name for name, module, _ in walk(model) if isinstance(module, LowRankLinear) or as_dense(module)]
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
        activation=activations.pop(),
        exclude=exclude,
        residual=residual,
    )


def count_parameters(module: nn.Module) -> int:
    """Number of elements in the parameters of `module`, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Planned:
    linear: DenseLayer
    homes: tuple[tuple[nn.Module, str], ...]
    rank: int
    residual: ResidualConfig | None


def _plan(model: nn.Module, config: LowRankConfig) -> tuple[dict[str, _Planned], dict[str, str]]:
    """What to replace and what to skip for which reason; raises before anything is touched."""
    modules = {name: (module, homes) for name, module, homes in walk(model)}
    if as_dense(model):
        raise ValueError("the model is itself a linear layer and cannot be replaced in place: build a LowRankLinear")
    if present := low_rank_layers(model):
        raise ValueError(f"the model is already low-rank: {_some(present)}")
    linears = {name: dense for name, (module, _) in modules.items() if (dense := as_dense(module))}
    if not linears:
        raise ValueError(f"the model ({type(model).__name__}) has no nn.Linear (nor Conv1D) to convert")
    targets = tuple(config.rank) if isinstance(config.rank, Mapping) and config.targets is None else config.targets
    _check_patterns("targets", targets or (), linears)
    _check_patterns("exclude", config.exclude, linears)

    chosen, skipped = {}, {}
    head = _output_head(model)
    tied = _tied_weights(model)
    for name, linear in linears.items():
        if targets is not None and not any(matches(pattern, name) for pattern in targets):
            skipped[name] = "not a target"
        elif any(matches(pattern, name) for pattern in config.exclude):
            skipped[name] = "excluded"
        elif isinstance(linear.module, nn.Linear) and type(linear.module) is not nn.Linear:
            skipped[name] = f"a {type(linear.module).__name__}, whose owner may use its weight without calling it"
        elif others := tied.get(id(linear.weight), set()) - {name}:
            skipped[name] = f"its weight is shared with {_some(others)}"
        elif targets is None and (linear.module is head or name.rpartition(".")[2] in HEADS):
            skipped[name] = "output head"
        else:
            chosen[name] = linear
    if not chosen:
        raise ValueError("nothing to convert: " + "; ".join(f"{name}: {reason}" for name, reason in skipped.items()))

    ranks = {name: _rank(config.rank, name, linear) for name, linear in chosen.items()}
    if isinstance(config.rank, Mapping):
        _check_patterns("rank", config.rank, chosen)
    residuals: dict[str, ResidualConfig | None] = dict.fromkeys(chosen)
    if config.residual is not None:
        _check_patterns("residual.scope", config.residual.scope_patterns, chosen)
        if isinstance(config.residual.alpha, Mapping):
            _check_patterns("residual.alpha", config.residual.alpha, chosen)
        residuals = {name: config.residual.for_layer(name) for name in chosen}
        if not any(residuals.values()):
            raise ValueError("residual: scope and alpha together name no layer that is converted")
    plan = {
        name: _Planned(linear=linear, homes=modules[name][1], rank=ranks[name], residual=residuals[name])
        for name, linear in chosen.items()
    }
    return plan, skipped


def _rank(rank: int | float | Mapping[str, int | float], name: str, linear: DenseLayer) -> int:
    smaller_side = min(linear.in_features, linear.out_features)
    wanted = lookup(rank, name)
    if wanted is None:
        raise ValueError(f"rank: the table has no entry for {name}, which is a target")
    number = max(1, round(wanted * smaller_side)) if isinstance(wanted, float) else wanted
    if number > smaller_side:
        raise ValueError(
            f"rank {number} is above the full rank {smaller_side} of {name} ({linear.in_features} -> "
            f"{linear.out_features}): give a smaller rank, a fraction, or a table by pattern, or exclude this layer"
        )
    return number


def _check_patterns(field: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    names = list(names)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            known = sorted({*names, *(name.rpartition(".")[2] for name in names)})
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0)
            raise ValueError(
                f"{field}: {pattern!r} matches no linear layer here; the nearest names are {', '.join(near)}"
            )


def _exact(name: str, names: Iterable[str]) -> str:
    """A pattern that matches `name` and no other of `names`: the name itself where that will do."""
    return name if not any(matches(name, other) for other in names if other != name) else f"^{re.escape(name)}$"


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def _tied_weights(model: nn.Module) -> dict[int, set[str]]:
    """From the id of each parameter to the names of the modules that hold it."""
    holders: dict[int, set[str]] = {}
    for name, module, _ in walk(model):
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(name)
    return holders


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
