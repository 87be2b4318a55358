"""Prepared tokens as sequences: blocks of a split, and the order in which training meets them."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class PackedBlocks(Dataset[dict[str, Tensor]]):
    """A split's token stream cut into blocks of `sequence_length`; a rest shorter than a block is left out.

    Args:
        shards: memory-mapped arrays of token ids, in order.
        sequence_length: tokens a block.

    Shape:
        an item is `input_ids` and `labels`, int64 (sequence_length,).

    Raises:
        ValueError: for a split shorter than one block.
    """

    def __init__(self, shards: list[np.ndarray], sequence_length: int) -> None:
        self.shards = shards
        self.sequence_length = sequence_length
        self.starts = np.cumsum([0, *(len(shard) for shard in shards)])
        if len(self) == 0:
            raise ValueError(f"a split of {self.starts[-1]} tokens holds no sequence of {sequence_length}")

    def __len__(self) -> int:
        return int(self.starts[-1]) // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self._read(index * self.sequence_length, self.sequence_length))
        return {"input_ids": ids, "labels": ids}

    def _read(self, start: int, count: int) -> np.ndarray:
        out = np.empty(count, dtype=np.int64)
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        filled = 0
        while filled < count:
            offset = start + filled - int(self.starts[shard])
            part = self.shards[shard][offset : offset + count - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1
        return out


class TrainingOrder(Dataset[dict[str, Tensor]]):
    """The sequences of a whole training run in the order in which they are used: a function of the seed alone.

    Item i is the same for any number of loader workers, processes and accumulation steps, and whatever the method.
    Each pass over the blocks has its own permutation.
    """

    def __init__(self, blocks: PackedBlocks, seed: int, num_sequences: int) -> None:
        self.blocks = blocks
        self.seed = seed
        self.num_sequences = num_sequences
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, position = divmod(index, len(self.blocks))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._permutation = torch.randperm(len(self.blocks), generator=generator)
            self._epoch = epoch
        return self.blocks[int(self._permutation[position])]
