"""Which linear layers of a model a config means, and why the others stay dense."""

from collections.abc import Iterable, Mapping

from torch import nn

from foldrank.core.config import LowRankConfig, matches
from foldrank.core.formatting import abbreviate
from foldrank.core.inventory import Inventory, LinearSpec, check_patterns
from foldrank.core.plain_linear import OFFLOADED, what_is_on


def choose(
    model: nn.Module, contents: Inventory, config: LowRankConfig, unconvertible: Mapping[str, str]
) -> tuple[dict[str, LinearSpec], dict[str, str]]:
    """The layers that the config means, and for all others why they stay dense."""
    linears = contents.linear_specs
    targets, exclude = config.targets, config.exclude
    # A table of names, such as a checkpoint's, is taken by name: none of them is the tail of another's.
    exact = targets is None and is_exact(config.rank, linears)
    if exact:
        exclude = ()
    elif targets is None and isinstance(config.rank, Mapping):
        targets = tuple(config.rank)
    check_patterns("targets", targets or (), linears, others=unconvertible)
    check_patterns("exclude", exclude, linears, others=unconvertible)
    chosen, skipped = {}, {}
    for name, linear in linears.items():
        if (exact and name not in config.rank) or not (targets is None or _any_matches(targets, name)):  # pyright: ignore[reportOperatorIssue]
            skipped[name] = "not a target"
        elif _any_matches(exclude, name):
            skipped[name] = "excluded"
        elif reason := _why_dense(linear):
            skipped[name] = reason
        elif others := contents.shared_with(linear.weight, f"{name}.weight"):
            owners = (other.rpartition(".")[0] or type(model).__name__ for other in others)
            skipped[name] = f"its weight is shared with {abbreviate(owners)}"
        else:
            chosen[name] = linear
    if not exact and targets is None:
        heads = _output_heads(model, contents, chosen)
        skipped |= {name: reason for name, reason in heads.items() if name in chosen}
    if config.dense_first or config.dense_last:
        remaining = [name for name in chosen if name not in skipped]
        skipped |= _dense_blocks(contents, config, remaining)
    return {name: linear for name, linear in chosen.items() if name not in skipped}, skipped


def _why_dense(linear: LinearSpec) -> str | None:
    """What a replacement would drop without a word; None where nothing."""
    module = linear.module
    if linear.weight is None:
        return "its weight is computed from others (parametrized, normalised or pruned)"
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        return f"a {type(module).__name__}, whose owner may use its weight without calling it"
    if not linear.weight.requires_grad:
        return "its weight is frozen (requires_grad is False), and the factors of a replacement would be drawn afresh"
    problem = what_is_on(module, type(module))
    return None if problem is None or problem == OFFLOADED else f"{problem}, which the replacement would drop"


def _output_heads(model: nn.Module, contents: Inventory, candidates: Iterable[str]) -> dict[str, str]:
    """The linear layers that are the output head, with what says so."""
    linears = list(contents.linear_specs)
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):  # of models that have none
        head = None
    if isinstance(head, nn.Module):
        inside = {id(module) for module in head.modules()}
        reason = "output head (get_output_embeddings gives it)"
        return {name: reason for name in linears if id(contents.modules[name]) in inside}
    lists = [
        (name, [layer for block in blocks for layer in block])
        for name, blocks in contents.block_lists(linears)
        if len(blocks) > 1
    ]
    if lists:
        # The last of the large lists: an encoder's and a decoder's, not that of some small heads.
        most = max(len(layers) for _, layers in lists)
        name, layers = [blocks for blocks in lists if 2 * len(blocks[1]) >= most][-1]
        last = max(linears.index(layer) for layer in layers)
        return dict.fromkeys(linears[last + 1 :], f"output head (after the last block of {name})")
    # A model of one layer has no head apart from it.
    only = set(candidates) == {linears[-1]}
    return {} if only else {linears[-1]: "output head (the last linear layer)"}


def is_exact(names: object, linears: Mapping[str, LinearSpec]) -> bool:
    """Whether a table is one from names of linear layers, such as a checkpoint's, and not from patterns."""
    return isinstance(names, Mapping) and names.keys() <= linears.keys()


def _any_matches(patterns: Iterable[str], name: str) -> bool:
    return any(matches(pattern, name) for pattern in patterns)


def _dense_blocks(contents: Inventory, config: LowRankConfig, targeted: Iterable[str]) -> dict[str, str]:
    """The targeted layers in the first and last blocks, with the reason why they stay dense."""
    name, blocks = contents.blocks(targeted)
    if not blocks:
        raise ValueError("dense_first, dense_last: no nn.ModuleList here holds targets, as blocks would: use exclude")
    if config.dense_first + config.dense_last >= len(blocks):
        raise ValueError(
            f"dense_first {config.dense_first} and dense_last {config.dense_last} leave none of the {len(blocks)} "
            f"blocks of {name} to convert"
        )
    first, last = blocks[: config.dense_first], blocks[len(blocks) - config.dense_last :]
    return {
        layer: f"in a block of {name} that stays dense ({field})"
        for field, dense in (("dense_first", first), ("dense_last", last))
        for layers in dense
        for layer in layers
    }
