"""Studies whose truth is known: records written by hand, as the engine writes them after training."""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from foldrank.compare.plan import Run
from foldrank.compare.records import Record, Stage, write_record
from foldrank.compare.study import Size, Study, StudyMethod, Sweep
from foldrank.train.metrics import EvaluationPoint, RunMetrics

RATES = (0.003, 0.006, 0.012)
BEST = 0.006
"""Where each method's planted learning-rate curve has its lowest point."""

COSTS = {"dense": (2_000_000, 12_000_000), "lowrank": (1_200_000, 7_200_000), "cola": (1_200_000, 7_200_000)}
"""Parameters and FLOPs per token by backbone."""

LAYERS = tuple(f"model.layers.{block}.self_attn.{part}_proj" for block in (0, 2, 10) for part in "qk")

Planted = Callable[[str, int], float]
"""From method and seed to the final test loss."""


def study_of(*methods: str | StudyMethod, **changes: Any) -> Study:
    """A study of these methods on one corpus, at one size, with five seeds and one seed of the sweep."""
    every = tuple(StudyMethod(name=method) if isinstance(method, str) else method for method in methods)
    whole = Study(
        title="Planted", question="Is the planted difference found?", methods=every, sweep=Sweep(learning_rates=RATES)
    )
    return replace(whole, **changes)


def planted(differences: Mapping[str, float], *, noise: float = 0.01, shared: float = 0.1, start: int = 0) -> Planted:
    """Loss 3 and a method's difference, with what a seed does to every method and noise of each run's own."""

    def loss(method: str, seed: int) -> float:
        common = random.Random(f"{start} {seed}").gauss(0, shared)
        return 3 + differences.get(method, 0.0) + common + random.Random(f"{start} {seed} {method}").gauss(0, noise)

    return loss


def metrics_of(**values: Any) -> RunMetrics:
    """What a run measured: these values, and others where they do not matter."""
    others = {
        **dict.fromkeys(("seed", "params", "params_dense", "steps", "tokens", "flops_per_token", "flops"), 1),
        **dict.fromkeys(("seconds", "tokens_per_second", "val_loss", "val_perplexity", "val_loss_folded"), 1.0),
        "val_tokens": 1,
        "val_perplexity_folded": 1.0,
        "folded_layers": 0,
        "fold_max_abs_weight_rounding": 0.0,
        "recipe": "tiny",
        "memory_bytes": {},
        "fold_weight_rounding": {},
        "fold_max_abs_logit_drift": 0.0,
        "fold_argmax_agreement": 1.0,
        "history": (),
        "sample": "",
        "device": "cpu",
        "threads": 1,
    }
    history = tuple(EvaluationPoint(**point) for point in values.pop("history", ()))
    return RunMetrics(**{**others, "history": history, **values})


def run(
    method: StudyMethod,
    seed: int,
    final: float,
    *,
    stage: Stage = "final",
    rate: float = BEST,
    corpus: str = "stdlib",
    size: str = "tiny",
    tokens: int = 100_000,
    spectra: bool = False,
    **metrics: Any,
) -> Record:
    """A finished run that ends at this loss."""
    kind = method.parsed_kind()
    backbone = kind.backbone
    params, flops = COSTS.get(backbone, COSTS["cola"])
    speed = 4000.0 if backbone == "dense" else 5000.0
    share = (0.25, 0.5, 0.75, 1.0)
    history = [
        {
            "step": round(400 * part),
            "tokens": round(tokens * part),
            "seconds": tokens * part / speed,
            "train_loss": final + 3 * (1 - part) + 0.1,
            "val_loss": final + 3 * (1 - part) + 0.05,
        }
        for part in share
    ]
    dlr = kind.residual
    whole = {
        "params": params,
        "params_dense": COSTS["dense"][0],
        "tokens": tokens,
        "steps": 400,
        "flops_per_token": flops,
        "flops": flops * tokens,
        "memory_bytes": {"weights": 4 * params, "optimizer": 8 * params},
        "seconds": tokens / speed,
        "tokens_per_second": speed,
        "val_loss": final + 0.05,
        "val_loss_folded": final + 0.05,
        "test_loss": final if stage == "final" else None,
        "test_perplexity": math.exp(final),
        "test_tokens": 20_000,
        "fold_weight_rounding": {layer: 1e-8 * (1 + seed) * (1 + place) for place, layer in enumerate(LAYERS)}
        if dlr
        else {},
        "fold_max_abs_logit_drift": 1e-6 * (1 + seed),
        "fold_argmax_agreement": 1.0 - 0.001 * seed,
        "history": history,
        "sample": f"def {method.name.replace('-', '_')}(self):\n    return self",
        "device": "cpu",
        "threads": 1,
        "commit": "0123456789abcdef",
        "versions": {"foldrank": "0.1.0", "torch": "2.13.0"},
    }
    values = 64 if backbone == "dense" else 16
    decay = 0.02 if dlr else 0.05
    return Record(
        id=Run(corpus=corpus, size=size, method=method.name, stage=stage, learning_rate=rate, seed=seed).id,
        corpus=corpus,
        size=size,
        method=method.name,
        stage=stage,
        learning_rate=rate,
        seed=seed,
        metrics=metrics_of(**{**whole, **metrics}),
        spectra={layer: [10 * math.exp(-decay * place) for place in range(values)] for layer in LAYERS}
        if spectra
        else {},
        recipe={"low_rank": None if backbone == "dense" else {"rank": 16}},
    )


def sweep_runs(study: Study, corpus: str = "stdlib", size: str = "tiny") -> list[Record]:
    """A finished sweep of each method that has one; the best rate is `BEST`."""
    return [
        run(method, seed, 3 + 0.3 * math.log(rate / BEST) ** 2, stage="sweep", rate=rate, corpus=corpus, size=size)
        for method in study.methods
        if method.learning_rate_of is None
        for rate in RATES
        for seed in study.sweep.seeds
    ]


def final_runs(study: Study, loss: Planted, corpus: str = "stdlib", size: str = "tiny") -> list[Record]:
    """Every final run, spectra with the first seed."""
    return [
        run(
            method,
            seed,
            loss(method.name, seed),
            tokens=60_000 if method.flops_of else 100_000,
            corpus=corpus,
            size=size,
            spectra=seed == study.seeds_of(method)[0],
        )
        for method in study.methods
        for seed in study.seeds_of(method)
    ]


def failed(record: Record, error: str) -> Record:
    """The same run, had it failed."""
    return replace(record, error=error, metrics=None, spectra={})


def by_id(records: Iterable[Record]) -> dict[str, Record]:
    return {record.id: record for record in records}


def write_study(folder: Path, study: Study, records: Sequence[Record]) -> Path:
    """A study's folder as the engine leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(study.to_yaml())
    for record in records:
        write_record(folder, record)
    return folder


def large_study() -> tuple[Study, list[Record]]:
    """Five methods and an ablation, two corpora; one run failed, some are missing, one is odd text."""
    methods = ("dense", "lowrank", "lowrank-dlr", "cola", "cola-dlr")
    study = study_of(
        *methods,
        StudyMethod(
            name="dense-short",
            kind="dense",
            flops_of="cola",
            learning_rate_of="dense",
            group="same cost",
            against=("cola-dlr",),
        ),
        StudyMethod(
            name="alpha-0.5",
            kind="cola-dlr",
            settings={"low_rank.residual.alpha": 0.5},
            group="alpha",
            against=("cola-dlr",),
        ),
        StudyMethod(
            name="alpha-2",
            kind="cola-dlr",
            settings={"low_rank.residual.alpha": 2.0},
            group="alpha",
            against=("cola-dlr",),
        ),
        title="Does the residual help? <script>alert(1)</script>",
        question="Whether DLR lowers the test loss of low-rank models at equal tokens, FLOPs and time.",
        corpora={"stdlib": {}, "packages": {"data.source": "packages"}},
        sizes={"tiny": Size(rank=16)},
    )
    records: list[Record] = []
    for place, (corpus, size) in enumerate((c, s) for c in study.corpora for s in study.sizes):
        loss = planted({"dense": -0.05, "cola-dlr": -0.04, "lowrank": 0.1, "lowrank-dlr": 0.12}, start=place)
        records += [*sweep_runs(study, corpus, size), *final_runs(study, loss, corpus, size)]
    odd = "</script><img src=x onerror=alert(1)> ```` \x1b[31m \ud800 |"
    first = next(place for place, record in enumerate(records) if record.stage == "final")
    records[first] = replace(records[first], metrics=replace(records[first].measured, sample=odd))
    records[-1] = failed(records[-1], "the loss is not finite at step 17 (|grad| = inf); lower the learning rate")
    del records[-3]
    return study, records
