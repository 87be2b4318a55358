"""An exported model where a model of torch is expected, to measure its loss."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from foldrank.runtime import Model


class ExportedModel(nn.Module):
    """Logits by the runtime of an exported model. It has no parameters but one, which says that it lives on the CPU.

    Args:
        folder: that `foldrank export` wrote, as ONNX or for OpenVINO.

    Raises:
        ValueError: where it holds no such model.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.exported = Model(folder)
        self.device_of = nn.Parameter(torch.empty(0))

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutputWithPast:
        logits = torch.from_numpy(self.exported.logits(input_ids.numpy()))
        return CausalLMOutputWithPast(logits=logits)  # pyright: ignore[reportArgumentType]
