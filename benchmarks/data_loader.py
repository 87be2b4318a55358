"""The data loader's share of a training step, at a recipe's sizes, in each layout.

    python benchmarks/data_loader.py [--recipe demo] [--rounds 20]

A batch is fetched and a step (forward, backward, AdamW) is made of it, in turns in one process, without loader
workers. Prints one JSON object, and the share in words.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from foldrank.data.config import DataConfig, Layout
from foldrank.data.prepare import prepare
from foldrank.data.prepared import PreparedData
from foldrank.recipes import RECIPES
from foldrank.train.model import build_model
from foldrank.train.recipe import Recipe

LAYOUTS: tuple[Layout, ...] = ("packed", "padded")


def share(recipe: Recipe, data: PreparedData, layout: Layout, rounds: int) -> dict[str, float]:
    """Median seconds of a batch and of a step, and the first over both."""
    train = recipe.train
    model = build_model(recipe, vocab_size=data.manifest["vocab_size"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    order = data.training(train.sequence_length, layout, seed=0, num_sequences=(rounds + 2) * train.batch_size)
    batches = iter(DataLoader(order, batch_size=train.batch_size))
    loading, stepping = [], []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        batch = next(batches)
        loaded = time.perf_counter()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loading.append(loaded - began)
        stepping.append(time.perf_counter() - loaded)
    load, step = statistics.median(loading[2:]), statistics.median(stepping[2:])  # the first two warm up
    return {"load_seconds": load, "step_seconds": step, "share": load / (load + step)}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo", choices=sorted(RECIPES))
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.recipe]
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(DataConfig(vocab_size=recipe.data.vocab_size), Path(folder) / "data")
        layouts = {layout: share(recipe, data, layout, arguments.rounds) for layout in LAYOUTS}
    result = {"recipe": arguments.recipe, "rounds": arguments.rounds, "threads": torch.get_num_threads(), **layouts}
    print(json.dumps(result, indent=2))
    for layout, figures in layouts.items():
        print(f"{layout}: the data loader takes {figures['share']:.2%} of a training step")


if __name__ == "__main__":
    main()
