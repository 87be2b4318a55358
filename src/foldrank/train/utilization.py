"""How busy the devices are: the model's FLOPs over those that they can reach at most (MFU, arXiv 2204.02311)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import TrainingArguments

from foldrank.recipes.schema import Recipe
from foldrank.train.accounting import training_flops


class Gpu(NamedTuple):
    """A GPU as NVIDIA's datasheets have it."""

    name: str
    """A part of the device's name."""
    peak_flops: float
    """FLOP/s of dense products in bfloat16, without sparsity."""
    memory_gib: int


GPUS = (
    Gpu("H200", 989e12, 141),  # H200 datasheet; SXM
    Gpu("H100 PCIe", 756e12, 80),  # H100 datasheet
    Gpu("H100", 989e12, 80),  # H100 datasheet; SXM
    Gpu("A100", 312e12, 80),  # A100 datasheet; there are some with 40
    Gpu("L40S", 362e12, 48),  # L40S datasheet
    Gpu("L4", 121e12, 24),  # L4 datasheet
    Gpu("RTX 4090", 165e12, 24),  # Ada architecture whitepaper, accumulated in float32
)


def peak_flops_of(device_name: str, dtype: str) -> float | None:
    """FLOP/s of dense products on a GPU; None where the table does not know it.

    Args:
        device_name: as `torch.cuda.get_device_name` has it.
        dtype: bfloat16, or float32, whose products are in TF32 and half as fast on all of these.
    """
    for gpu in GPUS:
        if gpu.name in device_name:
            return gpu.peak_flops if dtype == "bfloat16" else gpu.peak_flops / 2
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Utilization:
    """What a step costs, and what the devices could do."""

    flops_per_token: int
    """FLOPs of one token, forward and backward (train/accounting.py)."""
    flops_per_step: int
    """FLOPs of a step, padding included."""
    useful_flops_per_step: int
    """The same without what activation checkpointing computes again, which is no use of a device."""
    peak_flops: float | None
    """FLOP/s that one device can reach; None where that is not known."""
    devices: int
    """Devices that share a step."""
    shares: int
    """Shares that a step's sequences come in; devices among which the layers are split have one."""

    @classmethod
    def of(cls, recipe: Recipe, arguments: TrainingArguments, vocab_size: int) -> "Utilization":
        """That of a recipe on the devices of `arguments`."""
        train, devices = recipe.train, arguments.world_size * max(1, arguments.n_gpu)
        shares = devices // train.tensor_parallel
        flops = training_flops(recipe, gpus=shares, vocab_size=vocab_size)
        tokens = train.batch_size * train.sequence_length
        on_cuda = arguments.device.type == "cuda"
        known = peak_flops_of(torch.cuda.get_device_name(arguments.device), train.dtype) if on_cuda else None
        return cls(
            flops_per_token=flops.total,
            flops_per_step=flops.total * tokens,
            useful_flops_per_step=(flops.total - flops.recomputed) * tokens,
            peak_flops=train.peak_flops or known,
            devices=devices,
            shares=shares,
        )

    def facts(self) -> dict[str, float | None]:
        """What the log of a run says of it, from which its MFU follows."""
        peak = None if self.peak_flops is None else self.peak_flops * self.devices
        return {"flops_per_step": self.useful_flops_per_step, "peak_flops": peak}

    def of_steps(self, steps: int, seconds: float) -> float | None:
        """MFU of steps that took so long; None where the peak is not known, or no time has passed."""
        if self.peak_flops is None or seconds <= 0:
            return None
        return self.useful_flops_per_step * steps / seconds / (self.peak_flops * self.devices)
