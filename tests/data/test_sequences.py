"""Blocks are the plain concatenation cut up; the order of training is a function of the seed alone."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, SequentialSampler

from foldrank.data.order import ShuffledDataset
from foldrank.data.sequences import PackedBlocks


def shards(*lengths: int, dtype: str = "<u2") -> list[np.ndarray]:
    whole = np.random.default_rng(0).integers(0, 60_000, size=sum(lengths))
    return [part.astype(dtype) for part in np.split(whole, np.cumsum(lengths)[:-1])]


@pytest.mark.parametrize("sequence_length", [1, 2, 7, 10, 64])
@pytest.mark.parametrize(
    "lengths",
    [(100,), (10, 90), (3, 5, 92), (64, 64), (1, 1, 1, 1, 96), (99, 1), (50, 0, 50), (0, 70), (33, 31)],
    ids=str,
)
def test_blocks_are_the_plain_concatenation(lengths: tuple[int, ...], sequence_length: int) -> None:
    parts = shards(*lengths)
    blocks = PackedBlocks(parts, sequence_length)
    whole = np.concatenate(parts).astype(np.int64)
    assert len(blocks) == len(whole) // sequence_length
    for index in range(len(blocks)):
        item = blocks[index]
        expected = whole[index * sequence_length : (index + 1) * sequence_length]
        assert item["input_ids"].dtype == torch.int64
        assert item["input_ids"].tolist() == expected.tolist()
        assert item["labels"].tolist() == expected.tolist()


def test_ids_above_two_bytes() -> None:
    blocks = PackedBlocks([np.array([70_000, 2**31, 5], dtype="<u4")], 3)
    assert blocks[0]["input_ids"].tolist() == [70_000, 2**31, 5]


@pytest.mark.parametrize("parts", [[], shards(9), shards(4, 5)], ids=["no shard", "one", "two"])
def test_a_split_shorter_than_a_block_is_refused(parts: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match=f"a split of {sum(map(len, parts))} tokens holds no sequence of 10"):
        PackedBlocks(parts, 10)


def starts(order: ShuffledDataset) -> list[int]:
    """The sequences by their first token, which below is their number."""
    return [int(order[index]["input_ids"][0]) for index in range(len(order))]


def numbered(count: int) -> PackedBlocks:
    return PackedBlocks([np.repeat(np.arange(count, dtype="<u2"), 4)], 4)


@pytest.mark.parametrize("count", [1, 2, 13])
def test_each_pass_is_a_permutation(count: int) -> None:
    seen = starts(ShuffledDataset(numbered(count), seed=5, num_sequences=3 * count))
    passes = [seen[at : at + count] for at in range(0, 3 * count, count)]
    assert all(sorted(one) == list(range(count)) for one in passes)
    if count > 2:
        assert passes[0] != passes[1] != passes[2] != passes[0]
        assert passes[0] != sorted(passes[0])


def test_the_order_depends_on_the_seed_alone() -> None:
    order = starts(ShuffledDataset(numbered(13), seed=5, num_sequences=30))
    torch.manual_seed(99)
    torch.randn(7)
    again = ShuffledDataset(numbered(13), seed=5, num_sequences=30)
    backwards = [int(again[index]["input_ids"][0]) for index in reversed(range(30))][::-1]
    assert backwards == order
    assert starts(ShuffledDataset(numbered(13), seed=5, num_sequences=20)) == order[:20]
    assert starts(ShuffledDataset(numbered(13), seed=6, num_sequences=30)) != order


def test_reading_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    starts(ShuffledDataset(numbered(13), seed=5, num_sequences=30))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_change_nothing(workers: int, batch_size: int) -> None:
    order = ShuffledDataset(numbered(13), seed=5, num_sequences=30)
    loader = DataLoader(order, batch_size=batch_size, sampler=SequentialSampler(order), num_workers=workers)
    seen = torch.cat([batch["input_ids"][:, 0] for batch in loader]).tolist()
    assert seen == starts(order)


def test_passes_of_neighbouring_seeds_are_not_shared() -> None:
    """The second pass of one seed is not the first of the next, as it were with seed + epoch."""
    passes = {
        tuple(starts(ShuffledDataset(numbered(13), seed=seed, num_sequences=26))[at : at + 13])
        for seed in range(4)
        for at in (0, 13)
    }
    assert len(passes) == 8
