"""What the residual costs in training: two equal models, one with it, stepped in turns in one process.

    python benchmarks/residual_step.py [--recipe demo] [--rounds 20] [--batch-size N]

Prints one JSON object: the median over rounds of the ratio of their step times (forward, backward, AdamW), its
quartiles, and the ratio of the peaks of allocated memory as PyTorch's profiler counts them. The speed is reported only
where the numerics gate passed: the model with the residual gives the loss of the same model folded.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from foldrank import fold_
from foldrank.recipes import RECIPES
from foldrank.train.model import build_model
from foldrank.train.recipe import Recipe


class Subject:
    """A model, its optimizer, and what was measured of it."""

    def __init__(self, recipe: Recipe, ids: Tensor) -> None:
        self.model: PreTrainedModel = build_model(recipe, vocab_size=recipe.data.vocab_size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.ids = ids
        self.seconds: list[float] = []

    def step(self) -> None:
        """Forward, backward, update."""
        self.loss(self.model).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self, model: PreTrainedModel) -> Tensor:
        """Mean loss of `model` on the benchmark's tokens."""
        return model(input_ids=self.ids, labels=self.ids, use_cache=False).loss

    def timed_step(self) -> None:
        """A step, its seconds kept."""
        began = time.perf_counter()
        self.step()
        self.seconds.append(time.perf_counter() - began)

    def peak_bytes(self) -> int:
        """Largest sum of live allocations that one step makes, above what lives between steps."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            self.step()
        results: Any = profiled.profiler and profiled.profiler.kineto_results
        events = [event for event in results.events() if event.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        return peak


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo", choices=sorted(RECIPES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch-size", type=int)
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.recipe]
    assert recipe.low_rank is not None
    shape = (arguments.batch_size or recipe.train.batch_size, recipe.train.sequence_length)
    ids = torch.randint(recipe.data.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    without = Subject(replace(recipe, low_rank=replace(recipe.low_rank, residual=None)), ids)
    with_residual = Subject(recipe, ids)
    for subject in (without, with_residual):
        subject.step()
        subject.step()

    folded = copy.deepcopy(with_residual.model)
    fold_(folded)
    with torch.no_grad():
        drift = float((with_residual.loss(with_residual.model) - with_residual.loss(folded)).abs())
    if drift > 1e-5:
        raise SystemExit(f"numerics gate failed: the fold moves the loss by {drift}; no speed is reported")

    for round_number in range(arguments.rounds):
        pair = (without, with_residual) if round_number % 2 else (with_residual, without)
        for subject in pair:
            subject.timed_step()
    ratios = [a / b for a, b in zip(with_residual.seconds, without.seconds, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    peaks = with_residual.peak_bytes(), without.peak_bytes()
    print(
        json.dumps(
            {
                "recipe": arguments.recipe,
                "batch_size": shape[0],
                "rounds": arguments.rounds,
                "seconds_with": statistics.median(with_residual.seconds),
                "seconds_without": statistics.median(without.seconds),
                "time_ratio": median,
                "time_ratio_quartiles": [low, high],
                "time_ratio_of_the_fastest": min(with_residual.seconds) / min(without.seconds),
                "peak_bytes_with": peaks[0],
                "peak_bytes_without": peaks[1],
                "peak_ratio": peaks[0] / peaks[1],
                "fold_loss_drift": drift,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "machine": platform.machine(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
