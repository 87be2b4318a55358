"""Decode of exported models beside one another: ONNX Runtime in float32 and int8, and eager, one thread, in turns.

    python benchmarks/onnx_decode.py 130m --rounds 7 --out benchmarks/onnx/decode-130m.json

Random weights at the widths of the protocol's recipes: speed does not depend on them.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from foldrank import fold_
from foldrank.bench.record import machine
from foldrank.core.inventory import count_parameters
from foldrank.data.config import DataConfig
from foldrank.data.corpus import documents
from foldrank.data.tokenizer import train_tokenizer
from foldrank.export.onnx import PRECISIONS, export_onnx
from foldrank.provenance import commit, versions
from foldrank.recipes import RECIPES
from foldrank.runtime import Model, Sampling
from foldrank.structured import to_json
from foldrank.surgery.memory_format import to_column_major_
from foldrank.train.model import build_model

METHODS = ("dense", "lowrank", "cola")
NEW = 48
PROMPT = "def main("


def main() -> None:
    """Prints a line a round, and writes a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=("60m", "130m"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    PartialState(cpu=True)
    runs: dict[str, Callable[[], float]] = {}
    facts: dict[str, dict[str, Any]] = {}
    texts = (document.text for document in documents(DataConfig(max_documents=300)))
    tokenizer = train_tokenizer(texts, 4096)
    with tempfile.TemporaryDirectory() as folder:
        for method in arguments.methods.split(","):
            recipe = RECIPES[f"llama-{arguments.size}-{method}"]
            torch.manual_seed(0)
            model = build_model(recipe, 32000, device="cpu", eos_token_id=None).eval()
            fold_(model)
            model.config.use_cache = True
            model.set_attn_implementation("sdpa")
            for precision in arguments.precisions.split(","):
                name, out = f"{method} onnx {precision}", Path(folder) / f"{method}-{precision}"
                size = export_onnx(model, tokenizer, out, precision=precision)
                facts[name] = {"parameters": count_parameters(model), "bytes": size}
                runs[name] = _onnx(Model(out, threads=1))
            if arguments.eager:
                to_column_major_(model)
                facts[f"{method} eager"] = {"parameters": count_parameters(model)}
                runs[f"{method} eager"] = _eager(model, tokenizer)
        speeds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(arguments.rounds + 1):
            for name, run in runs.items():
                speed = run()
                if number:  # the first warms up
                    speeds[name].append(speed)
            print(number, {name: round(values[-1], 1) for name, values in speeds.items() if values}, flush=True)
    models = {
        name: {**facts[name], "tokens_per_second": values, "median": statistics.median(values)}
        for name, values in speeds.items()
    }
    for name, figures in models.items():
        print(f"{name:24} {figures['median']:8.1f} tokens/s  {figures.get('bytes', 0) / 1e6:6.1f} MB")
    record = {"size": arguments.size, "new_tokens": NEW, "threads": 1, "models": models}
    record |= {"machine": machine("cpu"), "versions": versions(), "commit": commit()}
    if arguments.out:
        arguments.out.write_text(to_json(record, indent=2) + "\n")


def _onnx(model: Model) -> Callable[[], float]:
    model.ends = frozenset()

    def run() -> float:
        tokens = model.tokens([PROMPT], NEW + 1, Sampling(temperature=0), 0)
        next(tokens)  # reads the prompt
        began = time.perf_counter()
        count = sum(1 for _ in tokens)
        return count / (time.perf_counter() - began)

    return run


@torch.no_grad()
def _eager(model: Any, tokenizer: Any) -> Callable[[], float]:
    ids = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)["input_ids"]

    def run() -> float:
        def seconds(count: int) -> float:
            began = time.perf_counter()
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
            return time.perf_counter() - began

        return NEW / (seconds(NEW + 1) - seconds(1))

    return run


if __name__ == "__main__":
    main()
