"""Model surgery: which linear layers a config means, and their replacement. Plans first, checks all, then mutates."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from torch import nn

from foldrank.core.config import SCOPES, LowRankConfig, ResidualConfig, lookup, matches
from foldrank.core.formatting import abbreviate
from foldrank.core.inventory import Inventory, LinearSpec, check_patterns, count_parameters, inventory, low_rank_layers
from foldrank.core.linear import LowRankLinear
from foldrank.surgery import backbones
from foldrank.surgery.approximation import Approximation, approximate_all_
from foldrank.surgery.ranks import solve_ranks
from foldrank.surgery.report import ConvertedLayer, FactorizeReport
from foldrank.surgery.targets import choose, is_exact

logger = logging.getLogger(__name__)


def factorize_(
    model: nn.Module,
    config: LowRankConfig,
    *,
    init: Approximation | None = None,
    sample: Iterable[Any] = (),
    seed: int = 0,
) -> FactorizeReport:
    """Replaces the linear layers that `config` targets by low-rank ones of its backbone, in place.

    The new factors are drawn afresh, as the backbone does it, on the device and in the dtype of the layer they replace;
    a bias is kept as a parameter and drawn afresh as well: the dense weights are dropped, unless `init` says how the
    factors approximate them (`surgery/approximation.py`).

    Without `targets` (or a table of ranks) the output head stays dense, which is known by what it is: what the model's
    `get_output_embeddings` gives; else the linear layers registered after the last transformer block; else, without
    blocks, the last linear layer. A table of ranks whose keys are all names of linear layers is taken by name alone.

    Args:
        model: any module that holds linear layers: `nn.Linear`, or `Conv1D` of transformers.
        config: ranks, activation, targets, residual.
        init: None, a fresh start; svd, the best approximation of each weight; activations, the best one on the inputs
            that `sample` gives it; regression, a near one on them, where a function stands between the factors, as the
            other two are for plain low rank. A residual on top changes nothing at the start.
        sample: for `activations` and `regression`, batches for the model: mappings of its arguments, or its one
            argument.
        seed: of the approximation of large weights.

    Returns:
        The report; `print(report)` is a table.

    Raises:
        ValueError: for a pattern that matches no linear layer, a rank that does not fit a layer, a model that is
            already low-rank, or one that is itself a linear layer, an `init` that is not for the backbone, or a sample
            that does not reach each layer. The model is then unchanged.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        >>> factorize_(model, LowRankConfig(rank=2, residual=ResidualConfig())).summary()
        'converted 1 of 2 linear layers, skipped 2; 1,072 -> 656 parameters'
    """
    if init not in (None, "svd", "activations", "regression"):
        raise ValueError(f"init must be svd, activations, regression or None, got {init!r}")
    contents = inventory(model)
    params_before = count_parameters(model)
    # Everything is built before anything is replaced: out of memory half-way leaves the model as it was.
    layers, skipped = _plan(model, contents, config)
    connect = backbones.CONNECTIONS.get(config.backbone, lambda *_: lambda: None)(model, layers)
    if init is not None:
        weights = {name: contents.linear_specs[name].weight_and_bias() for name in layers}
        approximate_all_(model, layers, weights, init, sample, seed)
    converted = tuple(_converted(name, contents.modules[name], layer) for name, layer in layers.items())
    for name, layer in layers.items():
        for parent, attribute in contents.parents[name]:
            setattr(parent, attribute, layer)
    connect()
    _leave_fast_paths(model)
    refuse_saving_(model)
    params_after = count_parameters(model)
    report = FactorizeReport(
        converted=converted, skipped=skipped, params_before=params_before, params_after=params_after
    )
    logger.info(report.summary())
    return report


SAVING = "save_pretrained"
"""The method by which a model of transformers saves itself, with the name of its class."""


def refuse_saving_(model: nn.Module) -> None:
    """Lets models of transformers refuse to save themselves, in place, until `convert_` gives them their class."""
    for module in model.modules():
        if callable(getattr(type(module), SAVING, None)):
            setattr(module, SAVING, _refused)


def allow_saving_(model: nn.Module) -> None:
    """Takes back what `refuse_saving_` did."""
    for module in model.modules():
        vars(module).pop(SAVING, None)


def _refused(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "this model is low-rank and its class is not: what it saved would load with random weights. Say what it is "
        "with foldrank.hf.convert_(model), or save its state_dict()"
    )


def describe(model: nn.Module) -> LowRankConfig | None:
    """The config that rebuilds the low-rank layers of `model` as they are now, by exact names; None if it has none.

    Raises:
        ValueError: where the layers differ in backbone, activation, scale or expansion, which one config cannot say.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        >>> _ = factorize_(model, LowRankConfig(rank=2, targets=["0"]))
        >>> config = describe(model)
        >>> config.rank, config.targets
        ({'0': 2}, None)
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
    residual = None
    if residuals:
        alphas = {name: residual.alpha for name, residual in residuals.items()}
        uniform = len(residuals) == len(layers) and len(set(alphas.values())) == 1
        residual = replace(kinds.pop(), alpha=next(iter(alphas.values())) if uniform else alphas)
    return LowRankConfig(rank={name: layer.rank for name, layer in layers.items()}, residual=residual, **settings[0])


def _plan(
    model: nn.Module, contents: Inventory, config: LowRankConfig
) -> tuple[dict[str, LowRankLinear], dict[str, str]]:
    """The new layers by name, and what to skip for which reason; raises before anything is touched."""
    linears = contents.linear_specs
    if "" in linears:
        raise ValueError("the model is itself a linear layer and cannot be replaced in place: build a LowRankLinear")
    if present := contents.low_rank_layers:
        raise ValueError(f"the model is already low-rank: {abbreviate(present)}")
    if not linears:
        raise ValueError(f"the model ({type(model).__name__}) has no nn.Linear (nor Conv1D) to convert")
    unconvertible = contents.unconvertible_weights()
    chosen, skipped = choose(model, contents, config, unconvertible)
    if not chosen:
        reasons = {reason: [name for name in skipped if skipped[name] == reason] for reason in skipped.values()}
        why = "; ".join(f"{abbreviate(names)}: {reason}" for reason, names in reasons.items())
        raise ValueError(f"nothing to convert: {why}")
    if config.init == "zero_writers" and not any(map(_writes, chosen)):
        raise ValueError("init zero_writers: no layer here is known by its name to write into the residual stream")
    ranks, residuals = _ranks(model, config, chosen), _residuals(config, chosen)
    layers = {name: _build(config, name, chosen[name], ranks[name], residuals[name]) for name in chosen}
    return layers, {name: skipped[name] for name in linears if name in skipped} | unconvertible


def _ranks(model: nn.Module, config: LowRankConfig, chosen: Mapping[str, LinearSpec]) -> dict[str, int]:
    if config.rank is None:
        assert config.budget is not None
        total = count_parameters(model)
        shapes = {name: (linear.in_features, linear.out_features) for name, linear in chosen.items()}
        backbone = backbones.class_of(config)
        others = total - sum(linear.in_features * linear.out_features for linear in chosen.values())
        others += sum(backbone.num_extra_params(*shape, **config.extra_config) for shape in shapes.values())
        return solve_ranks(shapes, budget=config.budget, total=total, other_params=others)
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


def _residuals(config: LowRankConfig, chosen: Mapping[str, LinearSpec]) -> dict[str, ResidualConfig | None]:
    residual = config.residual
    if residual is None:
        return dict.fromkeys(chosen)
    check_patterns("residual.scope", residual.scope_patterns, chosen)
    if is_exact(residual.alpha, chosen):
        named = {name: name in residual.alpha for name in chosen}  # pyright: ignore[reportOperatorIssue]
    else:
        named = dict.fromkeys(chosen, True)
        if isinstance(residual.alpha, Mapping):
            check_patterns("residual.alpha", residual.alpha, chosen)
    residuals = {name: residual.for_layer(name) if named[name] else None for name in chosen}
    if config.init == "zero_writers":
        residuals |= {name: None for name in chosen if _writes(name)}
    if not any(residuals.values()):
        raise ValueError("residual: scope and alpha together name no layer that is converted")
    return residuals


def _writes(name: str) -> bool:
    return matches(SCOPES["writing"], name)


def _build(
    config: LowRankConfig, name: str, linear: LinearSpec, rank: int, residual: ResidualConfig | None
) -> LowRankLinear:
    assert linear.weight is not None
    like: dict[str, Any] = {"bias": linear.bias, "device": linear.weight.device, "dtype": linear.weight.dtype}
    # Only where one is asked for, since a backbone of one's own need not know of starts.
    if config.init == "orthogonal":
        like["factor_start"] = "orthogonal"
    elif config.init == "zero_writers" and _writes(name):
        like["factor_start"] = "zero"
    layer = backbones.build(config, linear.in_features, linear.out_features, rank, residual=residual, name=name, **like)
    return layer.train(linear.module.training)


def _converted(name: str, linear: nn.Module, layer: LowRankLinear) -> ConvertedLayer:
    return ConvertedLayer(
        name=name,
        in_features=layer.in_features,
        out_features=layer.out_features,
        rank=layer.rank,
        residual=layer.residual is not None,
        params_before=count_parameters(linear),
        params_after=count_parameters(layer),
    )


def _leave_fast_paths(model: nn.Module) -> None:
    """In eval mode torch's own encoder reads `linear1.weight` where it may; here it must call the layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and low_rank_layers(module):
            module.activation_relu_or_gelu = 0  # neither ReLU nor GELU: the fast path is for these alone
        if isinstance(module, nn.TransformerEncoder) and low_rank_layers(module):
            module.use_nested_tensor = False
