"""The data loader's share of a training step, in each layout, without loader workers."""

import tempfile
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from foldrank.bench.interleaved import WARM_UP, interleaved_timing, timed
from foldrank.bench.record import Findings
from foldrank.bench.settings import Settings
from foldrank.bench.subjects import TrainedModel
from foldrank.data.config import Layout
from foldrank.data.prepare import prepare

LAYOUTS: tuple[Layout, ...] = ("packed", "padded")


def run(settings: Settings) -> Findings:
    """Fetches batches and makes steps of them, in turns.

    Raises:
        ValueError: where there is more than one method.
    """
    if len(settings.subjects) != 1:
        raise ValueError(f"loader takes one method, got {', '.join(settings.subjects)}")
    train, cases = settings.sizes().train, {}
    with tempfile.TemporaryDirectory() as place:
        data = prepare(settings.sizes().data, Path(place) / "data")
        subject = TrainedModel(settings, settings.subjects[0])
        for layout in LAYOUTS:
            count = (1 + WARM_UP + settings.rounds) * train.batch_size
            order = data.training(train.sequence_length, layout, seed=0, num_sequences=count)
            batches = iter(DataLoader(order, batch_size=train.batch_size))

            def load(batches: Any = batches) -> None:
                subject.batch = {name: tensor.to(settings.device) for name, tensor in next(batches).items()}

            load()
            turns = {"step": timed(subject.step, settings.device), "load": timed(load, settings.device)}
            figures = interleaved_timing(turns, settings.rounds, profile=settings.profile)
            seconds = figures["load"]["seconds"]
            figures["load"]["share"] = seconds / (seconds + figures["step"]["seconds"])
            cases[layout] = figures
    return Findings(cases=cases)
