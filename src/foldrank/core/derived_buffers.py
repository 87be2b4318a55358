"""Modules whose buffers follow from their settings: written anew where they were never filled, checked where rounded."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn


class DerivedBuffers(nn.Module):
    """A module with buffers of whole numbers that follow from its settings, and are in its state dict."""

    def write_buffers(self) -> None:
        """Writes the buffers."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `to_empty` on a model from the meta device leaves in buffers whatever lies in memory.
        from_meta = any(buffer.is_meta for buffer in self._own_buffers().values())
        super()._apply(fn, recurse)
        if from_meta and not any(buffer.is_meta for buffer in self._own_buffers().values()):
            self.write_buffers()
        return self

    def _own_buffers(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self._buffers.items() if buffer is not None}

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
        try:
            for name in self._own_buffers():
                if prefix + name in state_dict:
                    as_integers(prefix + name, state_dict[prefix + name])
        except ValueError as error:
            error_msgs.append(str(error))
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def as_integers(name: str, numbers: Tensor) -> Tensor:
    """Whole numbers of a state dict, also where a cast of all its tensors made them floating.

    Raises:
        ValueError: naming them, where that dtype cannot hold them all, so that some may be others now.
    """
    if not numbers.is_floating_point():
        return numbers
    if numbers.numel() and float(numbers.max()) >= 2 / torch.finfo(numbers.dtype).eps:
        raise ValueError(f"{name} was cast to {numbers.dtype}, which rounds such numbers: cast floating tensors alone")
    return numbers.long()
