"""The order in which training meets sequences: a function of the seed, the sources and their weights alone."""

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from foldrank.data.sequences import SequenceDataset

WINDOW = 1 << 16
"""Draws that are worked out together."""


class ShuffledDataset(Dataset[dict[str, Tensor]]):
    """The sequences of a whole training run in the order in which they are used: a function of the seed alone.

    Item i is the same for any number of loader workers, processes and accumulation steps, and whatever the method.
    Each pass over the sequences has its own permutation.
    """

    def __init__(self, blocks: SequenceDataset, seed: int, num_sequences: int) -> None:
        self.blocks = blocks
        self.seed = seed
        self.num_sequences = num_sequences
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, position = divmod(index, len(self.blocks))
        return self.blocks[int(self._of_pass(epoch)[position])]

    def num_tokens(self, count: int | None = None) -> int:
        """Tokens in the first `count` of them, padding left out; None: in all."""
        passes, rest = divmod(self.num_sequences if count is None else count, len(self.blocks))
        of_passes = passes * self._tokens_of_a_pass if passes else 0
        return of_passes + self.blocks.num_tokens(self._of_pass(passes)[:rest].numpy())

    @cached_property
    def _tokens_of_a_pass(self) -> int:
        return self.blocks.num_tokens(np.arange(len(self.blocks)))

    def _of_pass(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._permutation, self._epoch = torch.randperm(len(self.blocks), generator=generator), epoch
        return self._permutation


class MixedDataset(Dataset[dict[str, Tensor]]):
    """The sequences of a whole training run, drawn from several sources by weight; each source in its own order.

    Of the first n sequences, for every n, each source has its share, to within one sequence for two sources and half a
    sequence more for each further one. Item i is the same for any number of loader workers, processes and accumulation
    steps, and whatever the length of the run.

    Args:
        parts: from each source's name to its sequences; begun again when all were used.
        weights: of each source, above 0; what counts is their ratio.
        seed: of the order of each source's sequences.
        num_sequences: of the run.
    """

    def __init__(
        self, parts: Mapping[str, SequenceDataset], weights: Mapping[str, float], seed: int, num_sequences: int
    ) -> None:
        whole = sum(weights.values())
        self.draws = _Draws(np.array([weights[name] / whole for name in parts]))
        self.num_sequences = num_sequences
        counts = self.draws.counts(num_sequences)
        self.parts = {
            name: ShuffledDataset(blocks, seed, int(count))
            for (name, blocks), count in zip(parts.items(), counts, strict=True)
        }
        self._in_order = list(self.parts.values())

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part, number = self.draws.draw(index)
        return self._in_order[part][number]

    def num_tokens(self) -> int:
        """Tokens in all of them, padding left out."""
        return sum(self.tokens_by_source(self.num_sequences).values())

    def tokens_by_source(self, count: int) -> dict[str, int]:
        """Tokens of each source in the first `count` sequences, padding left out."""
        counts = self.draws.counts(count)
        return {name: part.num_tokens(int(n)) for (name, part), n in zip(self.parts.items(), counts, strict=True)}


class _Draws:
    """Which source each draw is from: the k-th of a source with share w has its turn at (k + 1/2) / w."""

    def __init__(self, shares: np.ndarray) -> None:
        self.shares = shares
        self._window = -1
        self._sources = self._numbers = np.empty(0, dtype=np.int64)

    def draw(self, index: int) -> tuple[int, int]:
        """The source of a draw, and how many draws of that source come before it."""
        position = index - self._open(index)
        return int(self._sources[position]), int(self._numbers[position])

    def counts(self, count: int) -> np.ndarray:
        """How many of the first `count` draws are from each source."""
        position = count - self._open(count)
        drawn = np.bincount(self._sources[:position], minlength=len(self.shares))
        return self._before(self._window) + drawn

    def _open(self, index: int) -> int:
        """Works out the window that holds a draw; the number of the window's first draw."""
        window = index // WINDOW
        while self._before(window).sum() > index:
            window -= 1
        while self._before(window + 1).sum() <= index:
            window += 1
        if window != self._window:
            first, end = self._before(window), self._before(window + 1)
            sources = np.repeat(np.arange(len(first)), end - first)
            numbers = np.concatenate([np.arange(*ends) for ends in zip(first, end, strict=True)])
            turns = np.lexsort((sources, (numbers + 0.5) / self.shares[sources]))
            self._window, self._sources, self._numbers = window, sources[turns], numbers[turns]
        return int(self._before(window).sum())

    def _before(self, window: int) -> np.ndarray:
        """Draws from each source before a window."""
        return np.ceil(window * WINDOW * self.shares - 0.5).astype(np.int64).clip(0)
