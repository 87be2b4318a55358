"""The three sentences before all lists, and how far a weight can move, by hand."""

import math
from dataclasses import replace

import pytest

from foldrank.compare.analysis import Analysis, analyse
from foldrank.compare.headline import headline, main_pairs, main_tables
from foldrank.compare.method_cost import movement
from foldrank.compare.study import Size, StudyMethod
from foldrank.recipes import load_recipe
from foldrank.train.trainer import training_arguments

from .studies import by_id, final_runs, planted, study_of, sweep_runs


def analysed(differences: dict[str, float], *methods: str | StudyMethod, **changes: object) -> Analysis:
    study = study_of(*methods, **changes)
    records = [
        run
        for size in study.sizes
        for run in (*sweep_runs(study, size=size), *final_runs(study, planted(differences), size=size))
    ]
    return analyse(study, by_id(records))


def test_the_answer_in_three_sentences() -> None:
    methods = ("dense", "lowrank", "lowrank-dlr", "cola", "cola-dlr")
    differences = {"lowrank": 0.1, "lowrank-dlr": 0.3, "cola": 0.1, "cola-dlr": -0.1}
    residual, low_rank, scope = headline(analysed(differences, *methods))
    assert residual.startswith(
        "The residual: of 2 comparisons with the same method without it, 1 better, 1 worse; the difference of the test "
        "loss runs from \N{MINUS SIGN}0.2"
    )
    assert residual.endswith(" (lowrank-dlr).")
    assert low_rank.startswith("Low rank (stdlib, tiny): the best, cola-dlr, ends at 2.8880")
    assert " with 60 % of the parameters of dense and is better than it (\N{MINUS SIGN}0.0921, " in low_rank
    assert low_rank.endswith(", 5 seeds); no model of at most its size ends lower.")
    assert scope == (
        "This rests on 5 seeds of each method on stdlib, tiny; 0.05 to 0.08 tokens per parameter; training that can "
        "move a weight by 2.0 entries of the residual. It speaks of nothing else."
    )


def test_a_smaller_dense_model_that_is_better_is_named() -> None:
    narrow = StudyMethod(name="dense-narrow", kind="lowrank", against=("dense",))  # of the planted parameters
    said = " ".join(headline(analysed({"cola": 0.2, "dense-narrow": 0.1}, "dense", "cola", narrow)))
    assert "The residual" not in said
    assert "the best, dense-narrow, ends at" in said
    said = " ".join(headline(analysed({"cola": 0.2}, "dense", "cola", replace(narrow, against=()))))
    assert "the best, cola, ends at" in said
    assert "; the lowest of at most its size is dense-narrow, at 2.9" in said


def test_the_last_size_comes_first_and_other_groups_are_left_out() -> None:
    other = StudyMethod(name="cola-half", kind="cola-dlr", group="others", against=("cola",))
    sizes = {"short": Size(rank=32), "long": Size(rank=32)}
    found = analysed({}, "dense", "cola", "cola-dlr", other, sizes=sizes)
    assert [(table.group, table.size) for table in main_tables(found)] == [("main", "long"), ("main", "short")]
    assert [(row.method, pair.method) for row, pair in main_pairs(main_tables(found)[0])] == [
        ("cola", "dense"),
        ("cola-dlr", "dense"),
        ("cola-dlr", "cola"),
    ]
    assert "Low rank (stdlib, long)" in " ".join(headline(found))


def test_a_study_without_dense_and_dlr_says_what_it_has() -> None:
    study = ("cola", StudyMethod(name="lowrank", against=("cola",)))
    said, scope = headline(analysed({"lowrank": 0.2}, *study))
    assert said.startswith("lowrank is worse than cola: its test loss is higher (+0.")
    assert scope.startswith("This rests on 5 seeds of each method")


def test_a_study_without_results_has_no_answer() -> None:
    assert headline(analyse(study_of("dense", "cola"), {})) == ()
    assert headline(analysed({}, "cola")) == ()


@pytest.mark.parametrize("steps", [10, 400])
def test_movement_is_the_sum_of_the_rates_that_trainer_takes(tmp_path, steps: int) -> None:
    import torch
    from transformers import get_scheduler

    recipe = load_recipe("tiny-cola-dlr").override({"train.steps": steps, "low_rank.residual.alpha": 0.5})
    arguments = training_arguments(recipe, tmp_path)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.train.learning_rate)
    scheduler = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=int(arguments.warmup_steps),
        num_training_steps=steps,
        scheduler_specific_kwargs={"min_lr_rate": recipe.train.min_learning_rate_ratio},
    )
    rates = 0.0
    for _ in range(steps):
        rates += optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
    entry = 0.5 / math.sqrt(4)
    # The closed form is off by the half of a step at either end.
    assert movement(recipe) == pytest.approx(rates / entry, abs=recipe.train.learning_rate / entry)


def test_movement_where_there_is_no_one_answer() -> None:
    assert movement(load_recipe("tiny-dense")) is None
    without, corrected = load_recipe("tiny-cola"), load_recipe("tiny-cola-dlr")
    assert movement(without) == movement(corrected)
    as_it_is = movement(corrected.override({"low_rank.residual.variance_correction": False}))
    assert as_it_is == pytest.approx((movement(corrected) or 0) / 2)
    for settings in ({"low_rank.residual.alpha": 0.0}, {"low_rank.rank": 0.25}, {"low_rank.rank": {"q_proj": 8}}):
        assert movement(corrected.override(settings)) is None
