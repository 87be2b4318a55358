"""How fast text is prepared, beside a bare `encode_batch` loop over the same text, and in how much memory.

    python benchmarks/prepare_speed.py [--source site-packages] [--max-documents N] [--rounds 2]

The two run in turns, each in a fresh process, on the same documents, batches and tokenizer. The loop has all text in
memory before its clock starts; `prepare` reads, splits, checks, tokenizes and writes within its own. Prints one JSON
object, and the ratio of the speeds in words.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer

from foldrank.data import tokenizer as encoding
from foldrank.data.config import DataConfig
from foldrank.data.corpus import documents
from foldrank.data.prepare import prepare


def prepared(config: DataConfig) -> dict[str, Any]:
    """Seconds and peak memory of `prepare`."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        data = prepare(config, Path(folder) / "data")
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_mib": peak_mib(), "tokens": data.tokens("train") + data.tokens("validation")}


def bare_loop(config: DataConfig) -> dict[str, Any]:
    """Seconds of `encode_batch` on all documents, with nothing around it."""
    backend = AutoTokenizer.from_pretrained(config.tokenizer).backend_tokenizer
    batches: list[list[str]] = [[]]
    size = 0
    for document in documents(config):
        batches[-1].append(document.text)
        size += len(document.text)
        if size >= encoding.BATCH_CHARACTERS:
            batches.append([])
            size = 0
    characters = sum(len(text) for batch in batches for text in batch)
    began = time.perf_counter()
    for batch in batches:
        backend.encode_batch(batch, add_special_tokens=False)
    return {"seconds": time.perf_counter() - began, "peak_mib": peak_mib(), "characters": characters}


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alone(function: Callable[[DataConfig], dict[str, Any]], config: DataConfig) -> dict[str, Any]:
    """Calls a function in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (config,))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="site-packages")
    parser.add_argument("--max-documents", type=int)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trained = Path(folder) / "tokenizer"
        training = (document.text for document in documents(DataConfig(source="stdlib", max_documents=200)))
        encoding.train_tokenizer(training, 4096).save_pretrained(trained)
        config = DataConfig(source=arguments.source, max_documents=arguments.max_documents, tokenizer=str(trained))
        ours, theirs = [], []
        for number in range(arguments.rounds):
            for function, results in [(prepared, ours), (bare_loop, theirs)][:: 1 if number % 2 == 0 else -1]:
                results.append(alone(function, config))
    ratios = [loop["seconds"] / run["seconds"] for loop, run in zip(theirs, ours, strict=True)]
    result = {
        "source": arguments.source,
        "characters": theirs[0]["characters"],
        "tokens": ours[0]["tokens"],
        "rounds": arguments.rounds,
        "prepare_seconds": [run["seconds"] for run in ours],
        "loop_seconds": [loop["seconds"] for loop in theirs],
        "speed_ratio": statistics.median(ratios),
        "speed_ratios": ratios,
        "prepare_peak_mib": max(run["peak_mib"] for run in ours),
        "cores": os.cpu_count(),
        "tokenizers": tokenizers.__version__,
    }
    print(json.dumps(result, indent=2))
    print(
        f"prepare runs at {result['speed_ratio']:.2f} of the speed of a bare encode_batch loop, in "
        f"{result['prepare_peak_mib']:.0f} MiB"
    )


if __name__ == "__main__":
    main()
