"""What a study runs next, from records made by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from foldrank.compare.plan import choice, expected, planned, recipe_of, total
from foldrank.compare.records import Record
from foldrank.compare.study import Study
from foldrank.compare.study_file import load_study

from .studies import metrics_of

STUDY: dict[str, Any] = {
    "title": "by hand",
    "methods": ["dense", "cola", "cola-dlr", {"name": "half", "kind": "cola-dlr", "learning_rate_of": "cola-dlr"}],
    "sweep": {"learning_rates": [0.01, 0.02, 0.04], "seeds": [7, 8], "extend": 2},
    "seeds": [0, 1, 2],
}


def study_of(tmp_path: Path, **changes: Any) -> Study:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return load_study(file)


def run_all(study: Study, loss: Any, records: dict[str, Record], stage: str = "sweep") -> dict[str, Record]:
    """Gives each planned run of a stage the loss that a function of method, rate and seed says; None: it fails."""
    while todo := [run for run in planned(study, records) if run.stage == stage]:
        for run in todo:
            value = loss(run.method, run.learning_rate, run.seed)
            facts = {n: getattr(run, n) for n in ("corpus", "size", "method", "stage", "learning_rate", "seed")}
            records[run.id] = (
                Record(id=run.id, error="ValueError: it is nan", **facts)
                if value is None
                else Record(id=run.id, metrics=metrics_of(val_loss_folded=value), **facts)
            )
    return records


def bowl(best: float) -> Any:
    return lambda _method, rate, seed: 3.0 + math.log(rate / best) ** 2 + seed / 1000


def test_the_sweep_comes_first_and_decides(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    first = planned(study, {})
    assert {run.stage for run in first} == {"sweep"}
    assert len(first) == 3 * 3 * 2, "three methods have a sweep of their own"
    assert len({run.id for run in first}) == len(first)
    records = run_all(study, bowl(0.021), {})
    finals = planned(study, records)
    assert [(run.method, run.seed) for run in finals] == [
        (method, seed) for method in ("dense", "cola", "cola-dlr", "half") for seed in (0, 1, 2)
    ]
    assert {run.learning_rate for run in finals} == {0.02}
    assert total(study) == len(records) + len(finals) == len(expected(study, records))
    assert planned(study, run_all(study, bowl(0.021), records, "final")) == []


def test_a_size_may_take_the_rates_that_were_chosen_at_another(tmp_path: Path) -> None:
    sizes = {"short": {"rank": 32}, "long": {"rank": 32, "learning_rates_of": "short"}}
    study = study_of(tmp_path, sizes=sizes)
    assert {run.size for run in planned(study, {})} == {"short"}, "there is no sweep at the longer one"
    records = run_all(study, bowl(0.021), {})
    finals = planned(study, records)
    assert {(run.size, run.learning_rate) for run in finals} == {("short", 0.02), ("long", 0.02)}
    assert total(study) == len(records) + len(finals)


def test_methods_are_compared_under_their_own_optimizer(tmp_path: Path) -> None:
    muon = {"train.optimizer": "muon"}
    with_muon = [{"name": f"{kind}-muon", "kind": kind, "settings": muon} for kind in ("dense", "cola", "cola-dlr")]
    study = study_of(tmp_path, methods=["dense", "cola", "cola-dlr", *with_muon])
    assert study.against(study.method("cola-dlr")) == ["dense", "cola"]
    assert study.against(study.method("cola-dlr-muon")) == ["dense-muon", "cola-muon"]
    assert study.against(study.method("dense-muon")) == []
    only_one_dense = study_of(tmp_path, methods=["dense", *with_muon[1:]])
    assert only_one_dense.against(only_one_dense.method("cola-muon")) == ["dense"]


def test_a_grid_stands_for_each_of_its_methods(tmp_path: Path) -> None:
    grid = {"rank": [8, 16], "low_rank.residual.alpha": [0.5, 1.0], "train.optimizer": ["muon"]}
    entry = {"name": "cola-dlr", "grid": grid, "settings": {"train.weight_decay": 0.0}, "group": "grid"}
    study = study_of(tmp_path, methods=["dense", entry])
    names = [f"cola-dlr-rank-{rank}-alpha-{alpha}-optimizer-muon" for rank in (8, 16) for alpha in (0.5, 1.0)]
    assert [method.name for method in study.methods] == ["dense", *names]
    recipe = study.recipe("stdlib", "tiny", study.method(names[1]))
    assert recipe.low_rank is not None
    assert recipe.low_rank.residual is not None
    assert (recipe.low_rank.rank, recipe.low_rank.residual.alpha) == (8, 1.0)
    assert (recipe.train.optimizer, recipe.train.weight_decay) == ("muon", 0.0)
    again = tmp_path / "again.yaml"
    again.write_text(study.to_yaml())
    assert load_study(again) == study, "written out, it is no grid any more"


def test_the_mean_over_the_seeds_decides(tmp_path: Path) -> None:
    study = study_of(tmp_path, methods=["cola"])
    by_seed = {(0.01, 7): 1.0, (0.01, 8): 4.0, (0.02, 7): 2.0, (0.02, 8): 2.0, (0.04, 7): 3.0, (0.04, 8): 3.0}
    records = run_all(study, lambda _, rate, seed: by_seed[rate, seed], {})
    found = choice(study, records, "stdlib", "tiny", study.method("cola"))
    assert (found.best, found.losses[0.02], found.best_at_boundary) == (0.02, 2.0, False)


@pytest.mark.parametrize(
    ("best", "rates", "chosen", "edge"),
    [
        (0.1, [0.01, 0.02, 0.04, 0.08, 0.16], 0.08, False),
        (9.0, [0.01, 0.02, 0.04, 0.08, 0.16], 0.16, True),
        (0.006, [0.0025, 0.005, 0.01, 0.02, 0.04], 0.005, False),
        (0.0001, [0.0025, 0.005, 0.01, 0.02, 0.04], 0.0025, True),
    ],
)
def test_a_best_rate_at_the_end_extends_the_sweep(
    tmp_path: Path, best: float, rates: list[float], chosen: float, edge: bool
) -> None:
    study = study_of(tmp_path, methods=["cola"])
    found = choice(study, run_all(study, bowl(best), {}), "stdlib", "tiny", study.method("cola"))
    assert (list(found.rates), found.best, found.best_at_boundary) == (rates, chosen, edge)


def test_a_rate_that_fails_is_not_chosen_and_one_that_always_fails_has_no_final_runs(tmp_path: Path) -> None:
    study = study_of(tmp_path, methods=["cola", "dense"])

    def loss(method: str, rate: float, seed: int) -> float | None:
        return None if method == "dense" or (rate, seed) == (0.02, 8) else bowl(0.02)(method, rate, seed)

    records = run_all(study, loss, {})
    of_cola = choice(study, records, "stdlib", "tiny", study.method("cola"))
    assert of_cola.losses[0.02] == math.inf
    assert of_cola.best in (0.01, 0.04)
    of_dense = choice(study, records, "stdlib", "tiny", study.method("dense"))
    assert of_dense.best is None
    assert {run.method for run in planned(study, records)} == {"cola"}


def test_recipes_differ_in_what_the_study_says_alone(tmp_path: Path) -> None:
    study = study_of(tmp_path, settings={"train.steps": 50, "train.eval_tokens": 100, "train.test_tokens": 200})
    first, *_, last = run_all(study, bowl(0.02), {}), *planned(study, run_all(study, bowl(0.02), {}))
    assert first
    recipe = recipe_of(study, last)
    assert (recipe.seed, recipe.train.learning_rate, recipe.train.test_tokens) == (2, 0.02, 200)
    assert recipe.low_rank is not None
    assert (recipe.low_rank.rank, recipe.low_rank.activation) == (32, "silu")
    sweep = recipe_of(study, planned(study, {})[0])
    assert (sweep.low_rank, sweep.train.steps, sweep.train.test_tokens) == (None, 50, None)


def test_equal_flops_means_fewer_steps_for_dense(tmp_path: Path) -> None:
    study = study_of(tmp_path, methods=["cola", {"name": "short", "kind": "dense", "flops_of": "cola"}])
    cola, short = (study.recipe("stdlib", "tiny", method) for method in study.methods)
    assert short.low_rank is None
    assert 0.5 * cola.train.steps < short.train.steps < 0.8 * cola.train.steps


def test_what_a_method_is_compared_with(tmp_path: Path) -> None:
    study = study_of(
        tmp_path, methods=["dense", "cola", "cola-dlr", {"name": "x", "kind": "cola-dlr", "against": ["cola"]}]
    )
    assert [study.against(method) for method in study.methods] == [[], ["dense"], ["dense", "cola"], ["cola"]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": ["dense", "densest"]}, "'densest' is of no known kind"),
        ({"methods": ["dense", "dense"]}, "two methods are called 'dense'"),
        ({"methods": [{"name": "a", "kind": "cola", "learning_rate_of": "b"}]}, "speaks of 'b'"),
        ({"methods": [{"name": "cola", "grid": {"rank": 8}}]}, "must have a list of values for each setting"),
        ({"methods": [{"name": "cola", "grid": [8]}]}, "must have a list of values for each setting"),
        (
            {"methods": [{"name": "cola", "grid": {"rank": list(range(1, 1026))}}]},
            "stands for 1025 methods, and at most",
        ),
        (
            {"sizes": {"a": {"rank": 8, "learning_rates_of": "b"}, "b": {"rank": 8}}},
            "size 'a' must stand behind 'b', whose learning rates it takes",
        ),
        ({"methods": [{"name": "cola", "learning_rate_of": "cola-dlr"}, "cola-dlr"]}, "must stand behind 'cola-dlr'"),
        ({"methods": [{"name": "cola", "corpora": ["c4"]}]}, "unknown corpora: c4"),
        ({"methods": []}, "needs methods"),
        ({"sweep": {"learning_rates": [0.1, 0.2, 0.9]}}, "must grow by one factor"),
        ({"sweep": {"learning_rates": []}}, "needs learning rates"),
        ({"settings": {"train.stepps": 3}}, "train.steps"),
        ({"colour": "red"}, "colour"),
        ({"base": "demo"}, "demo is low-rank"),
        ({"sizes": {"tiny": {"rank": 0}}}, "rank must be at least 1"),
    ],
)
def test_a_wrong_study_is_refused_in_words(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        study_of(tmp_path, **changes)


def test_a_study_survives_being_written(tmp_path: Path) -> None:
    study = study_of(tmp_path, corpora={"a": {"data.source": "x"}, "b": {}})
    (tmp_path / "again.yaml").write_text(study.to_yaml())
    assert load_study(tmp_path / "again.yaml") == study
