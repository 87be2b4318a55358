"""Modules whose buffers follow from their settings: written where they were never filled, checked where rounded."""

from collections.abc import Callable
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
        from_meta = self._on_meta()
        super()._apply(fn, recurse)
        if from_meta and not self._on_meta():
            self.write_buffers()
        return self

    def _on_meta(self) -> bool:
        return any(buffer is not None and buffer.is_meta for buffer in self._buffers.values())

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *others: Any
    ) -> None:
        try:
            for key in (prefix + name for name in self._buffers):
                if key in state_dict:
                    as_integers(key, state_dict[key])
        except ValueError as error:
            others[-1].append(str(error))
            return
        super()._load_from_state_dict(state_dict, prefix, *others)


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
