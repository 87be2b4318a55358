"""Perplexity: the worked example of docs/perplexity.md."""

import math

import pytest

from foldrank.train.evaluate import Evaluation

EXAMPLE = Evaluation(sums=[30.0, 30.0, 30.0, 10.0], counts=[10, 10, 10, 2])


def test_is_weighted_by_tokens() -> None:
    assert EXAMPLE.tokens == 32
    assert EXAMPLE.loss == pytest.approx(100 / 32)
    assert EXAMPLE.perplexity == pytest.approx(22.76, abs=0.005)


@pytest.mark.parametrize(("batch_size", "perplexity"), [(1, 16.44), (2, 8.26)])
def test_legacy_depends_on_the_batch_size(batch_size: int, perplexity: float) -> None:
    assert EXAMPLE.legacy_perplexity(batch_size) == pytest.approx(perplexity, abs=0.005)


def test_a_loss_too_large_for_a_float_is_infinite() -> None:
    assert Evaluation(sums=[1e6], counts=[1]).perplexity == math.inf
