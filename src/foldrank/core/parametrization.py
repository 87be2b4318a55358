"""What a low-rank layer has only while it trains: modules from weight to weight, which the fold removes.

Each marks the state dict as unfolded and says there how to fold it.
"""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from foldrank.core.derived_buffers import DerivedBuffers

SPEC = "spec"
"""Name of the buffer that marks a state dict as unfolded and says what folding it needs."""

REQUIRED = object()
"""Stands for a field of a spec that has no default."""


def check_same_state(weight: str, kind: str, *, here: bool, there: bool, folded_there: bool) -> list[str]:
    """What is wrong where a state dict (there) is to be loaded into a model (here), of which one alone is folded.

    To be put into the error_msgs of `load_state_dict`, which it raises with strict=False too.
    """
    if there and not here:
        return [
            f"{weight} is folded and the state dict is not: load it into a model with the {kind}, or fold the state "
            "dict first (foldrank.fold_state_dict)"
        ]
    if here and not there and folded_there:
        return [
            f"{weight} has a {kind} and the state dict is folded: it would be applied a second time. Load it into the "
            f"model without ({kind}=None, before attach_residual_, or after fold_)"
        ]
    return []


class WeightParametrization(DerivedBuffers):
    """A map of the up-projection's weight, shape and meaning preserved, that the fold applies once and for all.

    Its state is a small byte buffer `spec` (JSON, unharmed by dtype casts), besides what a subclass adds. A subclass
    computes `forward(weight)`.
    """

    kind: ClassVar[str]
    """What it is called in messages, and as an attribute of its layer."""
    spec_defaults: ClassVar[Mapping[str, Any]]
    """From each field of `spec` to the value that it has where a saved spec lacks it."""
    spec: Tensor

    def __init__(self, device: torch.device | str | None) -> None:
        super().__init__()
        self.register_buffer(SPEC, torch.empty(0, dtype=torch.uint8, device=device))

    def spec_fields(self) -> dict[str, Any]:
        """What `spec` says; None stands for what the state dict holds as a tensor."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Sets what is learned to its start, and writes the buffers anew."""
        raise NotImplementedError

    def write_buffers(self) -> None:
        self.spec = self._encoded().to(self.spec.device)

    def _encoded(self) -> Tensor:
        encoded = json.dumps(self.spec_fields(), sort_keys=True).encode()
        return torch.tensor(list(encoded), dtype=torch.uint8, device="cpu")

    @classmethod
    def decode(cls, spec: Tensor) -> dict[str, Any]:
        """What the `spec` of a state dict says, by name. Bytes that were cast to a floating dtype are read as well.

        Raises:
            ValueError: for bytes that no such module wrote, or that a later version of foldrank wrote.
        """
        try:
            encoded = bytes(int(byte) if float(byte).is_integer() else byte for byte in spec.tolist())
            saved = json.loads(encoded)
            fields = {**cls.spec_defaults, **saved}
            if unreadable := [name for name in fields if fields[name] is REQUIRED or name not in cls.spec_defaults]:
                raise ValueError(f"it lacks {unreadable[0]!r}, or a later version of foldrank wrote it")
            return fields
        except (ValueError, TypeError) as error:
            raise ValueError(f"the {cls.kind}'s spec in this state dict is damaged: {error}") from error

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        given, error_msgs = state_dict.get(prefix + SPEC), others[-1]
        if given is not None and (saved := self.decode(given)) != self.spec_fields():
            error_msgs.append(
                f"{prefix.rstrip('.')} was saved with {saved} and this model has {self.spec_fields()}: "
                f"build the model with the {self.kind} that the checkpoint was trained with"
            )
            return
        if given is not None and given.shape != self.spec.shape:  # it lacks fields that have their defaults here
            state_dict = {**state_dict, prefix + SPEC: self._encoded().to(given.device)}
        super()._load_from_state_dict(state_dict, prefix, *others)
