"""What a study will cost: runs, tokens, FLOPs, and minutes by the time that a few steps take here and now."""

import time
from itertools import pairwise
from typing import Any

import torch

from foldrank.compare.plan import settings, total
from foldrank.compare.study import Study
from foldrank.core.inventory import count_parameters
from foldrank.recipes.schema import Recipe
from foldrank.train.accounting import training_flops
from foldrank.train.model import build_model, resolve_vocab_size

TIMED_STEPS = 3


def cost(study: Study, workers: int = 1) -> dict[str, Any]:
    """The cost of the whole study if no sweep is extended, as plain values.

    A step of each model is timed on random tokens. Evaluations and the test are counted at a third of the training's
    time for as many tokens, the forward pass's share.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    sweep = study.sweep
    for corpus, size, method in settings(study):
        recipe = study.recipe(corpus, size, method)
        train = recipe.train
        per_step = train.batch_size * train.sequence_length
        left, ends = sweep.rates_left(), (0.0, *sweep.halve_at, 1.0)
        whole = sum(rates * (end - begin) for rates, (begin, end) in zip(left, pairwise(ends), strict=True))
        swept = study.has_sweep(size, method)
        sweeps = left[-1] * len(sweep.seeds) if swept else 0
        final_runs = len(study.seeds_of(method))
        steps = final_runs * train.steps
        if swept:
            steps += round(whole * len(sweep.seeds) * (sweep.steps or train.steps))
        row = rows.get((size, method.name))
        if row is None:
            device = "cpu" if train.device == "cpu" else torch.accelerator.current_accelerator() or "cpu"
            model = build_model(recipe, resolve_vocab_size(recipe), device=device)
            row = rows[size, method.name] = {
                "size": size,
                "method": method.name,
                "runs": 0,
                "parameters": count_parameters(model),
                "tokens": 0,
                "FLOPs": 0,
                "seconds a step": _seconds_per_step(model, recipe),
                "minutes": 0.0,
                "per_token": training_flops(recipe).total,
            }
        evaluations = steps // train.eval_every + 3 * (sweeps + final_runs)
        evaluated = evaluations * (train.eval_tokens or 0) + final_runs * (train.test_tokens or 0)
        row["runs"] += sweeps + final_runs
        row["tokens"] += steps * per_step
        row["FLOPs"] += steps * per_step * row["per_token"]
        row["minutes"] += row["seconds a step"] * (steps + evaluated / per_step / 3) / 60
    return {
        "title": study.title,
        "workers": workers,
        "runs": total(study),
        "tokens": sum(row["tokens"] for row in rows.values()),
        "flops": sum(row["FLOPs"] for row in rows.values()),
        "minutes": sum(row["minutes"] for row in rows.values()) / workers,
        "rows": list(rows.values()),
    }


def _seconds_per_step(model: Any, recipe: Recipe) -> float:
    train, device = recipe.train, model.device
    optimizer = torch.optim.AdamW(model.parameters())
    shape = (train.resolve_micro_batch_size(), train.sequence_length)
    ids = torch.randint(model.config.vocab_size, shape, device=device)
    passes = train.batch_size // shape[0]
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=train.dtype == "bfloat16")
    seconds = []
    for _ in range(TIMED_STEPS):
        began = time.perf_counter()
        losses = []
        for _ in range(passes):
            with autocast:
                losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss)
            losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[-1].item()  # waits for an accelerator
        seconds.append(time.perf_counter() - began)
    return min(seconds)
