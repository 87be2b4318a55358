"""Runs with numpy, tokenizers and onnxruntime alone (test_onnx.py): what an exported model gives, and what it takes.

Arguments: the exported folder, a file with prompts, a file for the facts.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main(folder: Path, prompts: Path, out: Path) -> None:
    import numpy  # noqa: F401
    import onnxruntime  # noqa: F401
    import tokenizers  # noqa: F401

    imported, began = resident(), time.perf_counter()
    from foldrank.runtime import Model, Sampling

    model = Model(folder, threads=1)
    loaded = time.perf_counter() - began
    greedy = Sampling(temperature=0)
    asked: list[str] = json.loads(prompts.read_text())
    alone = [model.generate(prompt, max_new_tokens=12, sampling=greedy)[0] for prompt in asked]
    facts: dict[str, Any] = {
        "seconds": loaded,
        "alone": alone,
        "batch": model.generate(asked, max_new_tokens=12, sampling=greedy),
        "streamed": ["".join(model.stream(prompt, max_new_tokens=12, sampling=greedy)) for prompt in asked],
        "memory": resident() - imported,
        "modules": sorted(name for name in ("torch", "transformers", "foldrank.core") if name in sys.modules),
    }
    out.write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
