"""What a budget pays for: every candidate within it, every number the plan's, every refusal one line."""

from pathlib import Path
from typing import Any

import pytest

from foldrank.recipes import RECIPES, load_recipe
from foldrank.recipes.published import PUBLISHED
from foldrank.train.accounting import evaluation_memory, memory, training_flops
from foldrank.train.candidates import Budget, Candidate, candidates
from foldrank.train.model import shape_of
from foldrank.train.optimizer_cost import optimizer_flops

from ..called import Foldrank

GIB = 1 << 30


def recipe_of(candidate: Candidate) -> Any:
    return load_recipe(candidate.recipe, candidate.settings)


@pytest.fixture(scope="module")
def in_hours() -> list[Candidate]:
    speed = 989e12 * 0.4
    return candidates(Budget(tokens=10**9, hours=0.5, gpus=2, flops_per_second=speed, gpu_memory=24 * GIB))


def test_all_are_within_the_hours_and_the_memory_by_the_plan(in_hours: list[Candidate]):
    assert {"llama-60m-cola", "llama-60m-dense", "gpt2-124m-cola"} <= {each.recipe for each in in_hours}
    assert "llama-7b-dense" not in {each.recipe for each in in_hours}
    for each in in_hours[::4]:
        recipe = recipe_of(each)
        used = max(memory(recipe, gpus=2).total, evaluation_memory(recipe, gpus=2))
        assert used <= 0.9 * 24 * GIB
        assert each.bytes_per_gpu == used
        assert recipe.train.dtype == "bfloat16"
        tokens = recipe.train.batch_size * recipe.train.sequence_length * recipe.train.steps
        assert each.tokens == tokens
        assert 10**9 - tokens < recipe.train.batch_size * recipe.train.sequence_length
        assert each.flops_per_token == training_flops(recipe, gpus=2).total
        hours = each.flops_per_token * tokens / (2 * 989e12 * 0.4) / 3600
        assert hours <= 0.5
        assert each.hours == pytest.approx(hours)


def test_the_largest_comes_first_and_dlr_costs_what_its_backbone_costs(in_hours: list[Candidate]):
    counts = [each.parameters for each in in_hours]
    assert counts == sorted(counts, reverse=True)
    (cola,) = (each for each in in_hours if each.recipe == "llama-60m-cola")
    dlr = load_recipe("llama-60m-cola-dlr", cola.settings)
    assert training_flops(dlr, gpus=2).total == cola.flops_per_token
    assert (cola.parameters, cola.dense_parameters) == (42_770_944, 58_073_600)
    assert (cola.optimizer, cola.learning_rate) == ("adamw", 0.006)


def test_flops_alone_say_how_many_tokens_they_pay_for():
    budget = 1e18
    for each in candidates(Budget(flops=budget, parameters=60_000_000), optimizer="muon"):
        recipe = recipe_of(each)
        one_step = (recipe.train.batch_size * recipe.train.sequence_length) * each.flops_per_token
        one_step += optimizer_flops(shape_of(recipe), recipe.train)
        assert budget - one_step < each.flops <= budget
        assert each.recipe.endswith("-muon")
        assert 30_000_000 <= each.parameters <= 60_000_000


def test_without_tokens_or_flops_a_recipe_has_its_own():
    for each in candidates(Budget(parameters=45_000_000)):
        assert recipe_of(each) == RECIPES[each.recipe]


def test_ranks_of_their_own_have_no_record():
    found = candidates(Budget(parameters=60_000_000), ranks=(0.125, 0.25, 0.5))
    ranks = {each.rank for each in found if each.recipe == "llama-60m-cola"}
    assert ranks == {64, 128, 256}
    for each in found:
        assert each.published == (PUBLISHED.get(each.recipe) if "low_rank.rank" not in each.settings else None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "give a budget"),
        (("--hours", "3"), "--hours needs the GPU that they are of"),
        (("--tokens", "1e9", "--gpu", "abacus"), "--gpu abacus is not known, only h200,"),
        (("--flops", "1"), "no shape that ships is within this budget"),
        (("--tokens", "nan"), "must be a number"),
        (("--tokens", "1e9", "--ranks", "0"), "must lie in (0, 1]"),
        (("--tokens", "1e9", "--study", "nowhere"), "nowhere is no folder of a study"),
    ],
)
def test_what_cannot_be_answered_is_one_line(foldrank: Foldrank, options: tuple[str, ...], says: str):
    called = foldrank("suggest", *options)
    assert called.code == 2
    assert says in called.stderr
    assert called.stderr.count("\n") == 1


def test_the_command_says_where_numbers_are_from(foldrank: Foldrank):
    study = Path(__file__).parents[2] / "studies" / "dlr-tiny"
    options = ("--parameters", "45e6", "--gpu", "l4", "--gpus", "2", "--study", study)
    told, result = foldrank("suggest", *options).stdout, foldrank("suggest", *options, "--json").json
    assert "34.04 (" in told
    assert "as printed in CoLA, arXiv 2502.10940" in told
    assert "2 x L4 at 100% of its peak by the datasheet, which no training reaches" in " ".join(told.split())
    (cola,) = (row for row in result["candidates"] if row["recipe"] == "llama-60m-cola")
    assert cola["command"].startswith("foldrank pretrain llama-60m-cola --train.steps 10000 --train.dtype bfloat16")
    assert all(row["loss"]["mean"] > 0 for row in result["records"])
    assert len(result["records"]) > 3
