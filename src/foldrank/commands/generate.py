"""`foldrank generate`: let a checkpoint continue a text."""

import argparse
import math
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command line."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder of a checkpoint")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="at most so many (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.7, metavar="T", help="0 is greedy (default: 0.7)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default: 0)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Generates."""
    from foldrank.core.memory_format import to_column_major_
    from foldrank.hf.checkpoint import load
    from foldrank.train.evaluate import continue_text

    if not arguments.prompt:
        raise ValueError("--prompt is empty: give at least one character to continue")
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    if not 0 <= arguments.temperature < math.inf:
        raise ValueError(f"--temperature must be a number of at least 0, got {arguments.temperature}")
    model, tokenizer = load(arguments.checkpoint)
    to_column_major_(model)  # it runs on the CPU, one token after the other
    text = continue_text(
        model,
        tokenizer,
        arguments.prompt,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
    )
    return {"checkpoint": str(arguments.checkpoint), "prompt": arguments.prompt, "text": text}


def show(result: dict[str, Any]) -> None:
    """Prints the text, prompt included."""
    print(result["text"])
