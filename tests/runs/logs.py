"""Logs and folders of runs, as a run writes them."""

import json
import math
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foldrank.recipes import load_recipe
from foldrank.structured import to_yaml

BEGAN = 1_795_000_000.0


def entries(steps: int, *, every: int = 0, **facts: Any) -> Iterator[dict[str, Any]]:
    """The entries of a run of so many steps, evaluated after each `every`."""
    began = {"step": 0, "event": "began", "host": "elsewhere", "pid": 1, "time": BEGAN}
    yield began | {"steps": steps, "tokens_per_step": 2048.0, "flops_per_step": 1e9, "peak_flops": 1e12} | facts
    for step in range(1, steps + 1):
        loss = 4 + 4 * math.exp(-step / 500) + 0.1 * math.sin(step)
        yield {
            "step": step,
            "loss": loss,
            "grad_norm": 1.0 + step % 3,
            "learning_rate": 1e-3 * step / steps,
            "seconds": step * 0.1,
            "peak_memory_bytes": 8 << 20,
            "epoch": step / steps,
            "time": BEGAN + step * 0.1,
        }
        if every and step % every == 0:
            yield {"step": step, "eval_loss": loss, "eval_perplexity": math.exp(loss), "time": BEGAN + step * 0.1}
            yield {"step": step, "event": "text", "text": f"written after {step}", "time": BEGAN + step * 0.1}


def here(**more: Any) -> dict[str, Any]:
    """Facts of a run that trains in this process."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), **more}


def write_run(folder: Path, log: Iterator[dict[str, Any]], *, recipe: str = "tiny-cola", steps: int) -> Path:
    """A run's folder with this log."""
    folder.mkdir(parents=True)
    about = {"schema": 2, "recipe": recipe, "id": "1", "versions": {"torch": "2.13.0"}, "lineage": []}
    about["data"] = {"kind": "prepared", "text_sha256": "ab" * 32, "tokenizer_sha256": "cd" * 32}
    settings = load_recipe("tiny-cola", {"train.steps": steps})
    (folder / "config.yaml").write_text(to_yaml({"run": about, **settings.to_dict()}))
    with (folder / "log.jsonl").open("w") as file:
        for entry in log:
            file.write(json.dumps(entry) + "\n")
    return folder
