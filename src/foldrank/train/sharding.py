"""Weights of which each process holds a share (FSDP2), from the model's first moment on.

    meta device -> a block is filled (train/start.py) -> sharded -> the next block ... -> the rest is filled, sharded

So no process holds more than its shares, one block, and what lies outside of the blocks. A unit is a block: gathered
before its forward and backward pass, its gradients summed into the shares behind it. What is outside of the blocks is
one more, which is gathered by the model's own forward pass alone: nothing may call the embedding, the last norm or the
head past it (`train/chunked_loss.py` does not).
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from foldrank.recipes.settings import TrainConfig


class Shards:
    """How a run shards its model over all its processes; one process alone holds all shares.

    Args:
        train: its `dtype`: with bfloat16 the blocks' weights are gathered in it, and gradients summed in float32.
        device: of this process.
    """

    def __init__(self, train: TrainConfig, device: torch.device) -> None:
        if not dist.is_initialized():
            backend = "gloo" if device.type == "cpu" else "nccl"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.mesh: DeviceMesh = init_device_mesh(device.type, (dist.get_world_size(),))
        # Autocast says what is computed in bfloat16: what goes from block to block stays in float32, as without shards.
        narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        self.of_blocks = narrow if train.dtype == "bfloat16" else MixedPrecisionPolicy()

    def shard_(self, module: nn.Module) -> None:
        """Leaves this process its share of a block's or the model's weights, of which each has all, in place."""
        outermost = isinstance(module, PreTrainedModel)
        fully_shard(module, mesh=self.mesh, mp_policy=MixedPrecisionPolicy() if outermost else self.of_blocks)


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a share of the model alone."""
    return isinstance(model, FSDPModule)
