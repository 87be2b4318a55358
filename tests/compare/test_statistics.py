"""Intervals against values worked out by hand, and against what they promise."""

import math

import numpy as np
import pytest

from foldrank.compare.effective_rank import DRAWN, effective_rank, spectrum
from foldrank.compare.statistics import LEVEL, difference, estimate, verdict


def test_interval_of_five_values_by_hand() -> None:
    # mean 3; squares 4 + 1 + 0 + 1 + 4 = 10, over 4: sd sqrt(2.5); t(0.975, 4) = 2.776445 from a printed table
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    assert (found.seeds, found.mean) == (5, 3.0)
    assert found.sd == pytest.approx(math.sqrt(2.5), rel=1e-12)
    assert (found.ci_low, found.ci_high) == pytest.approx((3 - half, 3 + half), rel=1e-6)


def test_interval_of_two_values_is_as_wide_as_it_must_be() -> None:
    # t(0.975, 1) = 12.7062; sd of 1 and 2 is sqrt(0.5), over sqrt(2): 0.5
    found = estimate([1.0, 2.0])
    assert (found.ci_low, found.ci_high) == pytest.approx((1.5 - 6.3531, 1.5 + 6.3531), rel=1e-5)


def test_one_value_has_no_interval() -> None:
    found = estimate([4.0])
    assert (found.mean, found.sd, found.ci_low, found.ci_high) == (4.0, None, None, None)
    assert verdict(found) == "too few seeds"


@pytest.mark.parametrize("values", [[], [1.0, math.inf], [math.nan]])
def test_what_has_no_mean_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="each finite"):
        estimate(values)


def test_differences_are_taken_seed_by_seed() -> None:
    # The seeds differ by far more than the methods; the differences are -0.1, -0.2, -0.3.
    ours = {0: 1.9, 1: 4.8, 2: 8.7, 7: 0.0}
    theirs = {2: 9.0, 1: 5.0, 0: 2.0, 8: 100.0}
    found = difference(ours, theirs)
    assert found.estimate is not None
    assert found.estimate.seeds == 3
    assert found.estimate.mean == pytest.approx(-0.2)
    assert found.estimate.sd == pytest.approx(0.1)
    # 4.302653 * 0.1 / sqrt(3) = 0.248414
    assert found.estimate.ci_high == pytest.approx(-0.2 + 0.248414, abs=1e-6)
    assert found.verdict == "no difference shown"


def test_verdicts() -> None:
    base = {0: 1.0, 1: 2.0, 2: 3.0}
    shift = {0: 0.5, 1: 0.51, 2: 0.49}
    lower = {seed: loss - shift[seed] for seed, loss in base.items()}
    assert difference(lower, base).verdict == "lower"
    assert difference(base, lower).verdict == "higher"
    assert difference(base, base).verdict == "no difference shown"
    assert difference({0: 1.0}, base).verdict == "too few seeds"
    assert difference({5: 1.0}, base).verdict == "too few seeds"
    assert difference({5: 1.0}, base).estimate is None


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int) -> None:
    draws = np.random.default_rng(7).normal(-0.03, 0.02, size=(4000, seeds))
    found = [estimate(row.tolist()) for row in draws]
    held = np.mean(
        [
            each.ci_low is not None and each.ci_high is not None and each.ci_low <= -0.03 <= each.ci_high
            for each in found
        ]
    )
    assert abs(held - LEVEL) < 4 * math.sqrt(LEVEL * (1 - LEVEL) / 4000)


def test_a_method_against_itself_is_called_different_one_time_in_twenty() -> None:
    draw = np.random.default_rng(8)
    verdicts = []
    for _ in range(2000):
        shared = draw.normal(3, 0.5, size=5)  # what a seed does to both
        ours, theirs = (dict(enumerate((shared + draw.normal(0, 0.01, size=5)).tolist())) for _ in range(2))
        verdicts.append(difference(ours, theirs).verdict)
    wrong = 1 - verdicts.count("no difference shown") / 2000
    assert abs(wrong - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 2000)
    assert abs(verdicts.count("lower") - verdicts.count("higher")) < 40


def test_effective_rank_by_hand() -> None:
    assert effective_rank([3.0, 3.0, 3.0, 3.0]) == pytest.approx(4)
    assert effective_rank([7.0, 0.0, 0.0]) == pytest.approx(1)
    assert effective_rank([0.0, 0.0]) == 0.0
    # shares 3/4 and 1/4: entropy 0.562335
    assert effective_rank([3.0, 1.0]) == pytest.approx(math.exp(0.562335), rel=1e-6)


@pytest.mark.parametrize("size", [1, DRAWN - 1, DRAWN, DRAWN + 1, 1000])
def test_a_drawn_spectrum_keeps_both_ends(size: int) -> None:
    values = [float(size - place) for place in range(size)]
    found = spectrum("layer", "dense", values)
    places = [place for place, _ in found.drawn]
    assert (places[0], places[-1], found.size) == (1, size, size)
    assert len(places) == len(set(places)) == min(size, DRAWN)
    assert found.drawn[0][1] == 1.0
    assert found.effective_rank == pytest.approx(effective_rank(values))
