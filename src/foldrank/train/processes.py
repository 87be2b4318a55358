"""The processes that share a run, as torchrun or `accelerate launch` started them."""

import torch
from accelerate import PartialState


def shared_by(device: str) -> PartialState:
    """The processes of a run; where there is no accelerator accelerate must be told, or each would be the only one.

    Args:
        device: `auto`, or `cpu`.
    """
    return PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())
