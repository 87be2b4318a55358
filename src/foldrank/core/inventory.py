"""What a model holds: the one tree walker, dense and low-rank layers, shared weights, blocks, names."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from foldrank.core.config import matches
from foldrank.core.linear import LowRankLinear

NO_LINEAR_MAP = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.modules.conv._ConvNd, ParametrizationList)
"""Modules whose matrices are no linear layer that a user would miss in a report."""


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
class LinearSpec:
    """A layer that computes x W + b, as surgery sees it: an `nn.Linear`, or transformers' `Conv1D` (GPT-2)."""

    module: nn.Module
    weight: Tensor
    in_features: int
    out_features: int
    bias: bool


def linear_spec(module: nn.Module) -> LinearSpec | None:
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
    return LinearSpec(
        module=module, weight=weight, in_features=in_features, out_features=out_features, bias=bias is not None
    )


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The low-rank layers of `model` by name."""
    return {name: module for name, module, _ in walk(model) if isinstance(module, LowRankLinear)}


def count_parameters(module: nn.Module) -> int:
    """Number of elements in the parameters of `module`, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def parameter_owners(model: nn.Module) -> dict[int, set[str]]:
    """From the id of each parameter to the names of the modules that hold it."""
    found: dict[int, set[str]] = {}
    for name, module, _ in walk(model):
        for parameter in module.parameters(recurse=False):
            found.setdefault(id(parameter), set()).add(name or type(model).__name__)
    return found


def unconvertible_weights(model: nn.Module) -> dict[str, str]:
    """Matrices that are a parameter of some other module, such as fused experts, with why surgery leaves them."""
    found = {}
    for name, module, _ in walk(model):
        if linear_spec(module) or isinstance(module, NO_LINEAR_MAP):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            # Positions and class tokens are matrices too, and no layer.
            if parameter.dim() >= 2 and min(parameter.shape) > 1 and not re.search("emb|pos", own):
                what = f"{parameter.shape[0]} weights fused in one parameter" if parameter.dim() > 2 else "a parameter"
                found[f"{name}.{own}".removeprefix(".")] = (
                    f"{what} {tuple(parameter.shape)} outside of any nn.Linear, which surgery does not reach"
                )
    return found


def blocks(model: nn.Module, layers: Iterable[str]) -> tuple[str, list[list[str]]]:
    """The list of blocks of `model`: the `nn.ModuleList` that holds most of `layers`, and which of them are in each.

    Entries that hold none are no blocks. The name is empty and there are no blocks where no list holds any.
    """
    layers = list(layers)
    lists = []
    for name, module, _ in walk(model):
        if isinstance(module, nn.ModuleList):
            entries = [f"{name}.{i}.".removeprefix(".") for i in range(len(module))]
            held = [[layer for layer in layers if layer.startswith(entry)] for entry in entries]
            lists.append((name, [names for names in held if names]))
    # The first of equals is the outermost: parents are walked before their children.
    return max(lists, key=lambda found: sum(map(len, found[1])), default=("", []))


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
