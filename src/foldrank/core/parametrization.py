"""What a low-rank layer has only while training: maps of its up-projection's weight, which the fold removes."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

SPEC = "spec"
"""Name of the buffer that marks a state dict as unfolded and says what folding it needs."""


class WeightParametrization(nn.Module):
    """A map of the up-projection's weight, shape and meaning kept, that the fold applies once and for all.

    Its state is a small byte buffer `spec` (JSON, unharmed by dtype casts), which makes a state dict say by itself that
    it is unfolded and how to fold it, besides what a subclass adds. A subclass computes `forward(weight)`.
    """

    kind: ClassVar[str]
    """What it is called in messages, and as an attribute of its layer."""
    spec_names: ClassVar[Sequence[str]]
    """The names in `spec`."""
    spec: Tensor

    def __init__(self, device: torch.device | str | None) -> None:
        super().__init__()
        self.register_buffer(SPEC, torch.empty(0, dtype=torch.uint8, device=device))

    def reset_parameters(self) -> None:
        """Sets what is learned to its start, and writes the spec anew."""
        raise NotImplementedError

    def write_spec(self) -> None:
        """Writes what `spec_fields` says now into the buffer."""
        encoded = json.dumps(self.spec_fields(), sort_keys=True).encode()
        self.spec = torch.tensor(list(encoded), dtype=torch.uint8, device="cpu").to(self.spec.device)

    def spec_fields(self) -> dict[str, Any]:
        """What `spec` says; None stands for what the state dict holds as a tensor."""
        raise NotImplementedError

    @classmethod
    def decode(cls, spec: Tensor) -> dict[str, Any]:
        """What the `spec` of a state dict says, by name.

        Raises:
            ValueError: for bytes that no such map wrote.
        """
        try:
            fields = json.loads(bytes(spec.tolist()))
            return {name: fields[name] for name in cls.spec_names}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the {cls.kind}'s spec in this state dict is damaged: {error}") from error

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = state_dict.get(prefix + SPEC)
        if given is not None and (saved := self.decode(given)) != self.spec_fields():
            error_msgs.append(
                f"{prefix.rstrip('.')} was saved with {saved} and this model has {self.spec_fields()}: "
                f"build the model with the {self.kind} that the checkpoint was trained with"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
