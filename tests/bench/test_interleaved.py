"""Subjects in turns, and the ratios of their rounds."""

from itertools import pairwise

import pytest
import torch

from foldrank.bench.interleaved import interleaved_timing, timed
from foldrank.bench.memory import allocated


def test_every_subject_begins_equally_often_and_follows_every_other() -> None:
    order: list[str] = []
    turns = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    interleaved_timing(turns, 6, warm_up=1)
    assert order[:3] == list("abc")
    rounds = ["".join(order[start : start + 3]) for start in range(3, len(order), 3)]
    assert sorted(first for first, *_ in rounds) == list("aabbcc")
    behind = {(one, two) for turn in rounds for one, two in pairwise(turn)}
    assert len(behind) == 6


def test_ratios_are_of_one_round() -> None:
    base, slow = iter([1.0, 2.0, 4.0, 8.0, 16.0]), iter([1.5, 4.0, 10.0, 24.0, 56.0])
    figures = interleaved_timing({"base": lambda: next(base), "slow": lambda: next(slow)}, 5, warm_up=0)
    assert figures["base"]["ratio"] == [1.0, 1.0, 1.0]
    assert figures["slow"]["ratio"] == [2.0, 2.5, 3.0]  # of 1.5, 2, 2.5, 3, 3.5
    assert figures["slow"]["seconds"] == 10.0
    assert figures["slow"]["ratio_of_the_fastest"] == 1.5
    assert figures["slow"]["seconds_of_rounds"] == [1.5, 4.0, 10.0, 24.0, 56.0]


def test_preparation_comes_first_and_is_not_timed() -> None:
    done: list[str] = []
    square = torch.ones(300, 300)
    prepare = timed(lambda: done.append("run"), "cpu", lambda: done.append("prepare") or (square @ square @ square))
    assert 0 < prepare() < 1e-3
    assert done == ["prepare", "run"]


def test_allocations_are_what_is_left_and_the_largest_on_the_way() -> None:
    kept = []

    def run() -> None:
        temporary = torch.empty(5000)
        kept.append(torch.empty(1000))
        del temporary
        torch.empty(2000)

    assert allocated(run, "cpu") == (4000, 24_000)


@pytest.mark.parametrize("rounds", [2, 3])
def test_few_rounds_are_enough_for_quartiles(rounds: int) -> None:
    low, median, high = interleaved_timing({"one": lambda: 2.0, "two": lambda: 3.0}, rounds)["two"]["ratio"]
    assert (low, median, high) == (1.5, 1.5, 1.5)
