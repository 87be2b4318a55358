"""Weights of which each process holds a part: the DTensors of FSDP2 or TP. Plain tensors pass through."""

from typing import Any

from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor."""
    return hasattr(tensor, "full_tensor")  # isinstance would need torch.distributed.tensor, a second of import


def full_tensor(tensor: Tensor) -> Tensor:
    """`tensor` itself, or all of it gathered from the processes, each of which must then ask."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_dtensor(tensor) else tensor


def to_local(tensor: Tensor) -> Tensor:
    """`tensor` itself, or the part of it that this process holds; to be written to under `torch.no_grad`."""
    sharded: Any = tensor
    return sharded.to_local() if is_dtensor(tensor) else tensor


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A `tensor` that every process has whole, sharded as `like` is; without communication."""
    if not is_dtensor(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements, src_data_rank=None)
