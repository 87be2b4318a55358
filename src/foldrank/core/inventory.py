"""What a model holds, from one walk over it: linear layers, who owns which parameter, shared ones, blocks."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from foldrank.core.config import matches
from foldrank.core.linear import LowRankLinear

NO_LINEAR_MAP = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.modules.conv._ConvNd, ParametrizationList)
"""Modules whose matrices are no linear layer that a user would miss in a report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSpec:
    """A layer that computes x W + b, as surgery sees it: an `nn.Linear`, or transformers' `Conv1D` (GPT-2)."""

    module: nn.Module
    weight: nn.Parameter | None
    """None where it is computed from others (parametrized, normalised or pruned)."""
    in_features: int
    out_features: int
    bias: bool

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """W (d_out, d_in) and b, where the weight is there."""
        assert self.weight is not None
        weight = self.weight if isinstance(self.module, nn.Linear) else self.weight.mT
        return weight, getattr(self.module, "bias", None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inventory:
    """What a model holds, each module once and under its first name; the root has the name ""."""

    modules: Mapping[str, nn.Module]
    """Without the factors inside a low-rank layer, which belong to it."""
    parents: Mapping[str, tuple[tuple[nn.Module, str], ...]]
    """From the name of a module to every module that holds it, with the attribute under which it does."""
    linear_specs: Mapping[str, LinearSpec]
    """The dense linear layers."""
    low_rank_layers: Mapping[str, LowRankLinear]
    parameter_owners: Mapping[int, tuple[str, ...]]
    """From the id of a parameter to each name that it has, `module.parameter`; those of the root and of factors too."""

    def shared_with(self, parameter: nn.Parameter | None, name: str) -> tuple[str, ...]:
        """The other names of the parameter called `name`: by these it is shared, with another module or in its own."""
        return tuple(other for other in self.parameter_owners.get(id(parameter), ()) if other != name)

    def blocks(self, layers: Iterable[str]) -> tuple[str, list[list[str]]]:
        """The list of transformer blocks: the `nn.ModuleList` that holds most of `layers`, and those in each block.

        Entries that hold none are no blocks. The name is empty and there are no blocks where no list holds any.
        """
        # The first of equals is the outermost: parents are walked before their children.
        return max(self.block_lists(layers), key=lambda blocks: sum(map(len, blocks[1])), default=("", []))

    def block_lists(self, layers: Iterable[str]) -> list[tuple[str, list[list[str]]]]:
        """Each `nn.ModuleList` (or `nn.ModuleDict` with numbers as keys) by name, with those of `layers` by entry."""
        names, lists = list(layers), []
        for name, module in self.modules.items():
            numbered = isinstance(module, nn.ModuleDict) and all(key.isdigit() for key in module)
            if isinstance(module, nn.ModuleList) or numbered:
                prefix = f"{name}." if name else ""
                inside: dict[str, list[str]] = {entry: [] for entry in module._modules}
                for layer in names:
                    entry = layer.removeprefix(prefix).partition(".")[0]
                    if layer.startswith(prefix) and layer != prefix + entry and entry in inside:
                        inside[entry].append(layer)
                lists.append((name, [layers for layers in inside.values() if layers]))
        return lists

    def unconvertible_weights(self) -> dict[str, str]:
        """Matrices that are a parameter of some other module, such as fused experts, with why surgery leaves them."""
        matrices = {}
        for name, module in self.modules.items():
            if name in self.linear_specs or isinstance(module, (*NO_LINEAR_MAP, LowRankLinear)):
                continue
            for attribute, parameter in module.named_parameters(recurse=False):
                # Positions and class tokens are matrices too, and no layer.
                if parameter.dim() >= 2 and min(parameter.shape) > 1 and not re.search("emb|pos", attribute):
                    fused = f"{parameter.shape[0]} weights fused in one parameter"
                    matrices[f"{name}.{attribute}".removeprefix(".")] = (
                        f"{fused if parameter.dim() > 2 else 'a parameter'} {tuple(parameter.shape)} outside of any "
                        "nn.Linear, which surgery does not reach"
                    )
        return matrices


def inventory(model: nn.Module) -> Inventory:
    """What `model` holds. The one walk over a model: whoever needs to know asks this, once an operation."""
    parents: dict[int, list[tuple[nn.Module, str]]] = {}
    modules: dict[str, nn.Module] = {}
    owners: dict[int, list[str]] = {}
    factors: set[int] = set()
    for name, module in model.named_modules():
        for attribute, child in module._modules.items():  # named_children() leaves out a child's second name
            if child is not None:
                parents.setdefault(id(child), []).append((module, attribute))
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{attribute}".removeprefix("."))
        if id(module) not in factors:
            modules[name] = module
        if isinstance(module, LowRankLinear):
            factors.update(id(child) for child in module.modules() if child is not module)
    return Inventory(
        modules=modules,
        parents={name: tuple(parents.get(id(module), ())) for name, module in modules.items()},
        linear_specs={name: spec for name, module in modules.items() if (spec := linear_spec(module))},
        low_rank_layers={name: module for name, module in modules.items() if isinstance(module, LowRankLinear)},
        parameter_owners={key: tuple(names) for key, names in owners.items()},
    )


def linear_spec(module: nn.Module) -> LinearSpec | None:
    """`module` as a dense linear layer; None where it is none."""
    # Not `module.weight`, which a parametrization would compute.
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Linear):
        in_features, out_features = module.in_features, module.out_features
    # By name and shape, because the core imports torch alone. Its weight is (in, out); it is called as a Linear is.
    elif type(module).__name__ == "Conv1D" and weight is not None and weight.dim() == 2:
        in_features, out_features = weight.shape
        if (getattr(module, "nx", None), getattr(module, "nf", None)) != (in_features, out_features):
            return None
    else:
        return None
    bias = getattr(module, "bias", None) is not None
    return LinearSpec(module=module, weight=weight, in_features=in_features, out_features=out_features, bias=bias)


def low_rank_layers(model: nn.Module) -> Mapping[str, LowRankLinear]:
    """The low-rank layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def count_parameters(module: nn.Module) -> int:
    """Number of elements in the parameters of `module`, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def check_patterns(
    field: str,
    patterns: Iterable[str],
    names: Iterable[str],
    *,
    what: str = "linear layer",
    others: Mapping[str, str] | None = None,
) -> None:
    """Refuses a pattern that matches none of `names`, each the name of a `what`.

    Args:
        field: where the patterns were given.
        patterns: as in `foldrank.core.config.matches`.
        names: what they may match.
        what: the kind of thing that `names` are.
        others: names that cannot be meant, with the reason.

    Raises:
        ValueError: naming the pattern and the nearest names, or the reason.
    """
    names = list(names)
    for pattern in patterns:
        if any(matches(pattern, name) for name in names):
            continue
        for name, reason in (others or {}).items():
            if matches(pattern, name):
                raise ValueError(f"{field}: {pattern!r} matches no {what} here, only {name}: {reason}")
        known = sorted({*names, *(name.rpartition(".")[2] for name in names)})
        near = difflib.get_close_matches(pattern, known, n=3, cutoff=0)
        raise ValueError(f"{field}: {pattern!r} matches no {what} here; the nearest names are {', '.join(near)}")
