"""The start of a model: from the meta device, where it has shapes alone, to the device that trains it.

    each module, its children first (a low-rank layer as one)
      -> memory on the CPU -> drawn there by a generator named by the seed and the module -> each block to its place

So no start depends on what else is drawn, in which order, by which method, on which device or in how many processes;
nothing dense is drawn that surgery would throw away; and no more than one block lies in memory twice.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldrank.core.drawn import named_generator
from foldrank.core.finite import all_finite
from foldrank.core.inventory import inventory
from foldrank.core.linear import LowRankLinear


@torch.no_grad()
def start_(
    model: PreTrainedModel,
    seed: int,
    device: torch.device | str = "cpu",
    *,
    place: Callable[[nn.Module], object] | None = None,
) -> tuple[str, ...]:
    """Fills a model on the meta device with its initial weights, in place.

    Low-rank layers start as their backbone says (`reset_parameters`), all other modules as transformers starts them
    (`_init_weights` of the model that they belong to), and what that leaves out as its own `reset_parameters` says.

    Args:
        model: on the meta device, all of it.
        seed: of all that is drawn.
        device: where the weights go.
        place: leaves of each block, and at the end of the model, on the device what belongs there, in place; None: all.

    Returns:
        The names of the modules that have been given memory, in order.

    Raises:
        ValueError: naming a parameter or buffer that nothing initializes.
    """
    # A parameter that modules share is drawn under its first name, and is no memory under its others.
    contents = inventory(model)
    owners = contents.parameter_owners.values()
    shared = {other: names[0] for names in owners for other in names[1:]}
    blocks, _ = contents.blocks([*contents.low_rank_layers, *contents.linear_specs])

    def at_home(module: nn.Module) -> None:
        module.to(device)
        if place is not None:
            place(module)

    filled: list[str] = []
    with torch.random.fork_rng(devices=()):
        filled.extend(_filled(model, "", model, seed, shared, {blocks: at_home} if blocks else {}))
    for other, name in shared.items():
        holder, _, attribute = other.rpartition(".")
        setattr(model.get_submodule(holder), attribute, model.get_parameter(name))
    at_home(model)
    return tuple(filled)


def _filled(
    module: nn.Module,
    name: str,
    owner: PreTrainedModel,
    seed: int,
    shared: dict[str, str],
    places: Mapping[str, Callable[[nn.Module], object]],
) -> Iterator[str]:
    """Fills a module and those in it; what `places` has under its name is done with each of its children."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    low_rank = isinstance(module, LowRankLinear)
    for attribute, child in () if low_rank else module.named_children():
        yield from _filled(child, _join(name, attribute), owner, seed, shared, places)
        if name in places:
            places[name](child)
    parts = dict(module.named_modules()) if low_rank else {"": module}
    tensors = [_join(name, path, key) for path, part in parts.items() for key, _ in _tensors(part)]
    if tensors and all(tensor in shared for tensor in tensors):
        return
    for part in parts.values():
        part._apply(_with_memory, recurse=False)
    torch.default_generator.manual_seed(named_generator(seed, name).initial_seed())
    if isinstance(module, LowRankLinear):
        module.reset_parameters()
    else:
        try:
            owner._init_weights(module)
        except AttributeError:
            # GPT-2 draws some layers from above, which surgery may have replaced since.
            if not any(isinstance(child, LowRankLinear) for child in module.children()):
                raise
        if any(_is_unfilled(tensor) for _, tensor in _tensors(module)) and hasattr(module, "reset_parameters"):
            module.reset_parameters()  # pyright: ignore[reportCallIssue]
    for path, part in parts.items():
        for key, tensor in _tensors(part):
            if _is_unfilled(tensor):
                raise ValueError(
                    f"{_join(name, path, key)} is initialized neither by {type(owner).__name__}._init_weights nor by "
                    f"a reset_parameters of {type(part).__name__}: give it one of them"
                )
    if tensors:
        yield name


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers of the module itself."""
    tensors = {**module._parameters, **module._buffers}
    return [(name, tensor) for name, tensor in tensors.items() if tensor is not None]


def _with_memory(tensor: Tensor) -> Tensor:
    """What was on the meta device on the CPU, where NaN says that nobody has filled it yet."""
    if not tensor.is_meta:
        return tensor
    return torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 0, device="cpu")


def _is_unfilled(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not all_finite(tensor)


def _join(*names: str) -> str:
    return ".".join(filter(None, names))
