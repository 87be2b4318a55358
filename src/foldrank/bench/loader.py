"""The data loader's share of a training step, in each layout, without loader workers."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from foldrank.bench.interleaved import WARM_UP, interleaved_timing, timed
from foldrank.bench.record import Findings
from foldrank.bench.settings import Settings
from foldrank.bench.trained_model import TrainedModel
from foldrank.data.config import Layout
from foldrank.data.prepare import prepare

LAYOUTS: tuple[Layout, ...] = ("packed", "padded")


def run(settings: Settings) -> Findings:
    """Fetches batches and makes steps of them, interleaved.

    Raises:
        ValueError: where there is more than one method.
    """
    if len(settings.method_names) != 1:
        raise ValueError(f"loader takes one method, got {', '.join(settings.method_names)}")
    train, cases = settings.sizes().train, {}
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(settings.sizes().data, Path(folder) / "data")
        trained = TrainedModel(settings, settings.method_names[0])
        for layout in LAYOUTS:
            count = (1 + WARM_UP + settings.rounds) * train.batch_size
            order = data.training(replace(train.sequences, layout=layout), seed=0, num_sequences=count)
            batches = iter(DataLoader(order, batch_size=train.batch_size))

            def load(batches: Any = batches) -> None:
                trained.batch = {name: tensor.to(settings.device) for name, tensor in next(batches).items()}

            load()
            timers = {"step": timed(trained.step, settings.device), "load": timed(load, settings.device)}
            figures = interleaved_timing(timers, settings.rounds, profile=settings.profile)
            seconds = figures["load"]["seconds"]
            figures["load"]["share"] = seconds / (seconds + figures["step"]["seconds"])
            cases[layout] = figures
    return Findings(cases=cases)
