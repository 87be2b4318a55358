"""The door for patterns: a recipe's regular expressions are tried here, with a time limit, before the core uses them.

Some match for ever (`(([a-z.]+)+)+Z`), and Python's `re`, which the core takes since it needs torch alone, cannot be
stopped. So they are tried in a process that can: another library with a time limit would prove nothing about `re`.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache

from foldrank.core.config import LowRankConfig, is_name

LLAMA = (*(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

LAYERS = (
    *(f"model.layers.{{}}.{layer}" for layer in LLAMA),
    *(f"transformer.h.{{}}.{layer}" for layer in GPT2),
)
"""Names of the layers of the families that have low-rank classes."""

SECONDS = 2.0
"""For all patterns together, which take microseconds where they are as they should be."""

MAX_CHARS = 1000
MAX_PATTERNS = 20_000

PROGRAM = """
import json, re, sys
for pattern in json.loads(sys.argv[1]):
    print(json.dumps(pattern), flush=True)
    for name in json.loads(sys.argv[2]):
        re.fullmatch(pattern, name)
"""
"""Says which pattern it tries, and tries it."""


def check_patterns(config: LowRankConfig, num_layers: int) -> None:
    """Refuses patterns that take long on names such as layers have.

    Raises:
        ValueError: naming the pattern.
    """
    patterns = tuple(dict.fromkeys(pattern for pattern in _patterns(config) if not is_name(pattern)))
    if len(patterns) > MAX_PATTERNS or any(len(pattern) > MAX_CHARS for pattern in patterns):
        raise ValueError(f"low_rank: at most {MAX_PATTERNS:,} patterns of at most {MAX_CHARS:,} characters are read")
    # A few at a time, since they are arguments of a process.
    for start in range(0, len(patterns), 50):
        _try(patterns[start : start + 50], num_layers)


@lru_cache
def _try(patterns: tuple[str, ...], num_layers: int) -> None:
    names = ["lm_head", *(layer.format(block) for block in {0, num_layers - 1} for layer in LAYERS)]
    command = [sys.executable, "-I", "-c", PROGRAM, json.dumps(patterns), json.dumps(names)]
    try:
        subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        tried = (error.stdout or b"").decode().splitlines()
        pattern = tried[-1] if tried else "a pattern"
        raise ValueError(f"low_rank: matching {pattern} takes too long: write it without nested repeats") from None


def _patterns(config: LowRankConfig) -> Iterator[str]:
    yield from config.rank if isinstance(config.rank, Mapping) else ()
    yield from config.targets or ()
    yield from config.exclude
    if config.residual is not None:
        yield from config.residual.scope if not isinstance(config.residual.scope, str) else ()
        yield from config.residual.alpha if isinstance(config.residual.alpha, Mapping) else ()
