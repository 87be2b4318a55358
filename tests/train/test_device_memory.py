"""What a recipe leaves open is chosen by its plan, and where memory is short the message has the plan's figures."""

from pathlib import Path

import pytest

from foldrank.recipes import RECIPES
from foldrank.train.accounting import evaluation_memory, memory
from foldrank.train.device_memory import LOGITS, fit

from ..forked import Start

GIB = 1 << 30
RECIPE = RECIPES["llama-60m-cola-dlr"].override({"train.batch_size": 96, "train.micro_batch_size": None})


def peak(micro_batch_size: int, *, chunked: bool) -> int:
    recipe = RECIPE.override({"train.micro_batch_size": micro_batch_size, "train.chunked_loss": chunked})
    return max(memory(recipe).total, evaluation_memory(recipe))


@pytest.mark.parametrize("gib", [3, 6, 12, 40, 200])
def test_the_micro_batch_is_the_largest_that_the_plan_fits_in(gib: int) -> None:
    train = fit(RECIPE, gib * GIB).train
    size, chunked = train.micro_batch_size, train.chunked_loss
    assert size is not None
    assert chunked is not None
    assert 96 % size == 0
    assert peak(size, chunked=chunked) <= gib * GIB
    logits = 4 * RECIPE.nominal_vocab_size * RECIPE.train.sequence_length
    assert chunked == (logits * size > LOGITS * gib * GIB)
    for larger in (n for n in range(size + 1, 97) if 96 % n == 0):
        assert peak(larger, chunked=logits * larger > LOGITS * gib * GIB) > gib * GIB


def test_what_is_given_is_kept() -> None:
    given = RECIPE.override({"train.micro_batch_size": 48, "train.chunked_loss": False})
    assert fit(given, GIB) == given
    assert fit(RECIPE, 1).train.micro_batch_size == 1
    # With two processes each has half of a step.
    assert fit(RECIPE, 400 * GIB, processes=2).train.micro_batch_size == 48


def test_a_run_without_enough_memory_says_what_to_lower(start: Start, recipe_file: Path, tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    big = ("--train.batch_size", 64, "--train.sequence_length", 128, "--model.vocab_size", 60_000)
    big += ("--train.chunked_loss", "false")
    process = start("pretrain", recipe_file, "--out", tmp_path / "run", *big, errors=errors, more_bytes=1 << 30)
    process.join(120)
    last = errors.read_text().splitlines()[-1]
    assert process.exitcode == 2, last
    assert "out of memory: the plan is " in last
    assert "lower train.micro_batch_size (now 64)" in last
