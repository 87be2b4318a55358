"""Weights of other people's layers with a residual on them, as `foldrank.attach_residual_` leaves them: where they are,
and how they become plain parameters again.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from foldrank.core.inventory import Inventory
from foldrank.core.residual import DuplicatedLatentResidual


def attached_residuals(contents: Inventory) -> Iterator[tuple[str, nn.Module, str, DuplicatedLatentResidual]]:
    """Each attached weight: its name, the module that holds it, its name there, and its residual.

    Raises:
        ValueError: where the weight has further parametrizations, or its module is of a class made since.
    """
    for name, owner in contents.modules.items():
        for attribute, steps in parametrizations(owner).items():
            residuals = [step for step in steps if isinstance(step, DuplicatedLatentResidual)]
            if not residuals:
                continue
            full = f"{name}.{attribute}".removeprefix(".")
            if len(steps) > 1:
                raise ValueError(f"{full} has parametrizations beside the residual, which hide it: remove them first")
            if attribute not in vars(type(owner)):
                raise ValueError(
                    f"{full} belongs to a {type(owner).__name__}, a class made after the residual was attached (FSDP2 "
                    "does that): fold the full state dict (foldrank.fold_state_dict)"
                )
            yield full, owner, attribute, residuals[0]


def detach(owner: nn.Module, attribute: str) -> None:
    """Makes an attached weight the plain parameter again that it was, holding what `original` holds."""
    # torch's remove_parametrizations deletes the property from the class, which copies of this module share.
    original = owner.get_parameter(f"parametrizations.{attribute}.original")
    kind = type(owner)
    if len(parametrizations(owner)) > 1:
        del parametrizations(owner)[attribute]
        members = {
            name: value for name, value in vars(kind).items() if name not in (attribute, "__dict__", "__weakref__")
        }
        plain = type(kind.__name__, kind.__bases__, members)
    else:
        del owner.parametrizations
        plain = kind.__bases__[0]
    owner.__class__ = plain  # pyright: ignore[reportAttributeAccessIssue]
    owner.register_parameter(attribute, original)


def parametrizations(owner: nn.Module) -> Any:
    """Those of torch on each weight of `owner`, by its name there; none where it has none."""
    return owner.parametrizations if is_parametrized(owner) else {}
