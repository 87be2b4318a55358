"""One optimizer for a model with factors: which parameter goes by which rule, and a step of all of them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from foldrank.core.anchored_decay import decoupled_decay
from foldrank.core.dtensor import full_tensor
from foldrank.core.inventory import inventory, low_rank_layers
from foldrank.core.linear import LowRankLinear
from foldrank.optim.rules import RULES

OPTIMIZERS: Mapping[str, tuple[str, str]] = {
    "adamw": ("adamw", "adamw"),
    "muon": ("muon", "muon"),
    "spectron": ("spectron", "muon"),
}
"""From an optimizer's name to its rules for the factors of low-rank layers and for the blocks' dense matrices. All
else, embedding, head, norms, biases, a trainable alpha or scale and sparse values, goes by AdamW."""

SPECTRON_OVER_ADAMW = 0.04 / 0.006
"""Learning rate of Spectron's factors, 0.04 in its paper, over that of AdamW and Muon beside it."""

DEFAULTS = {"betas": (0.9, 0.999), "eps": 1e-8, "momentum": 0.95, "iterates_in": None}


class FactorOptimizer(Optimizer):
    """Steps each group of parameters by its rule; learning-rate schedules, clipping, `state_dict` and hooks as ever.

    Args:
        groups: each with `params`, `rule` (`foldrank.optim.rules.RULES`), `lr` and `weight_decay`; besides `betas` and
            `eps` for adamw, `momentum` and `iterates_in` (a dtype by name, or None) for the others.
        layers: low-rank layers, of whose B Spectron takes the norm with the residual, which is that of B*.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(4, 2))
        >>> group = {"params": [weight], "rule": "muon", "lr": 0.1, "weight_decay": 0.0, "momentum": 0.95}
        >>> optimizer = FactorOptimizer([group])
        >>> weight.sum().backward()
        >>> _ = optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    def __init__(self, groups: Iterable[dict[str, Any]], layers: Iterable[LowRankLinear] = ()) -> None:
        super().__init__(groups, DEFAULTS)
        self._layers = tuple(layers)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of all groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Looked up at each step, since sharding puts other parameters in the layers, which may be after this was made.
        layers = {id(layer.up.weight): layer for layer in self._layers}

        def effective(factor: Tensor) -> Tensor:
            layer, whole = layers.get(id(factor)), full_tensor(factor)
            return whole if layer is None else layer.effective_weight(whole)

        for group in self.param_groups:
            RULES[group["rule"]](group, self.state, effective)
        return loss

    def decay_rates(self) -> dict[int, float]:
        """From the id of each parameter to the share of it that decays in a step, whatever its rule."""
        return decoupled_decay(self)


def factor_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    momentum: float = 0.95,
    iterates_in: str | None = None,
) -> FactorOptimizer:
    """An optimizer for the factors, or dense matrices, of a model's blocks, with AdamW for all else.

    Build it after `fully_shard`, from the model that is trained; `print(optimizer)` shows its groups.

    Args:
        model: any module.
        name: adamw; muon (orthogonalized momentum, Jordan 2024, with updates as large as AdamW's, so that one learning
            rate serves both); spectron (arXiv 2602.12429), whose factors take 6.7 times the learning rate.
        lr: learning rate.
        weight_decay: decoupled, on matrices alone: a step takes lr * weight_decay of each away, whatever its rule.
        betas: AdamW's running averages.
        momentum: of muon and spectron.
        iterates_in: dtype of the Newton-Schulz iteration by name; None: that of the gradients, at least float32.

    Raises:
        ValueError: for a name that is unknown, and for spectron without low-rank layers or with a low-rank scale.

    Example:
        >>> from foldrank import LowRankConfig, factorize_
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        >>> report = factorize_(model, LowRankConfig(rank=2, targets=["0"]))
        >>> [(group["rule"], len(group["params"])) for group in factor_optimizer(model, "muon", lr=0.01).param_groups]
        [('adamw', 1), ('adamw', 2), ('muon', 2)]
    """
    groups = parameters_by_rule(model, name)
    ratio = {"spectron": SPECTRON_OVER_ADAMW}
    return FactorOptimizer(
        [
            {
                "params": parameters,
                "rule": rule,
                "lr": lr * ratio.get(rule, 1.0),
                "weight_decay": weight_decay / ratio.get(rule, 1.0) if decays else 0.0,
                "betas": betas,
                "momentum": momentum,
                "iterates_in": iterates_in,
            }
            for rule, decays, parameters in groups
        ],
        layers=low_rank_layers(model).values(),
    )


def parameters_by_rule(model: nn.Module, name: str) -> list[tuple[str, bool, list[nn.Parameter]]]:
    """The trained parameters of a model in groups: the rule of each, and whether weight decay is for them.

    Raises:
        ValueError: for an optimizer that is unknown, and for spectron without low-rank layers or with a low-rank scale.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"no optimizer is called {name!r}: there are {', '.join(OPTIMIZERS)}")
    contents = inventory(model)
    layers, linears = contents.low_rank_layers, contents.linear_specs
    if name == "spectron" and not layers:
        raise ValueError("spectron is for the factors of low-rank layers, and the model has none: take muon or adamw")
    if name == "spectron" and (scaled := [layer for layer in layers if layers[layer].scale is not None]):
        raise ValueError(f"spectron does not know the low-rank scale of {scaled[0]}: take muon or adamw")
    in_blocks = {layer for block in contents.blocks([*layers, *linears])[1] for layer in block}
    factors = [factor.weight for layer in layers.values() for factor in (layer.down, layer.up)]
    dense = [linear.weight for layer, linear in linears.items() if layer in in_blocks]
    by_rule: dict[str, list[nn.Parameter]] = {}
    for rule, matrices in zip(OPTIMIZERS[name], (factors, dense), strict=True):
        trained = [weight for weight in matrices if isinstance(weight, nn.Parameter) and weight.requires_grad]
        by_rule.setdefault(rule, []).extend(trained)
    seen = {id(parameter) for parameters in by_rule.values() for parameter in parameters}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in seen]
    groups = [
        ("adamw", True, [p for p in rest if p.dim() > 1]),
        ("adamw", False, [p for p in rest if p.dim() < 2]),
        *((rule, True, parameters) for rule, parameters in by_rule.items()),
    ]
    return [group for group in groups if group[2]]
