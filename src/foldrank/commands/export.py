"""`foldrank export`: a folded checkpoint in a form for other tools."""

import argparse
from pathlib import Path
from typing import Any

from foldrank.commands.checkpoint_arguments import add_checkpoint_arguments, with_notes

TOKENS = 64
"""On which both models are compared, at most."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command line."""
    parser.description = (
        "Write a folded checkpoint as a plain dense one of its family, W = B A, for tools that know nothing of low "
        "rank (llama.cpp, Ollama, any serving). It is as large as the dense model again, and possible where nothing "
        "stands between the factors (docs/export.md)."
    )
    add_checkpoint_arguments(parser, "folder of a folded checkpoint")
    parser.add_argument("--format", choices=("dense",), default="dense", help="default: dense")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="new folder")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Merges, compares, saves."""
    import torch

    from foldrank.atomic import refuse_existing
    from foldrank.core.inventory import count_parameters
    from foldrank.hf.checkpoint import inspect, load
    from foldrank.hf.dense import to_dense
    from foldrank.train.run_folder import save

    folder, out = arguments.checkpoint, arguments.out
    if (state := inspect(folder).state) != "folded":
        raise ValueError(f"{folder} is {state}: export takes a folded checkpoint")
    refuse_existing(out, option="--out")
    notes: list[str] = []
    model, tokenizer = load(folder, accept_changes=arguments.accept_changes, tell=notes.append)
    dense = to_dense(model)
    length = min(TOKENS, getattr(model.config, "max_position_embeddings", TOKENS))
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        change = (dense(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()
    if not torch.isfinite(change):
        raise ValueError(f"{folder}: its outputs are not finite: its weights hold NaN or infinity")
    save(dense, tokenizer, out)
    result = {
        "checkpoint": str(folder),
        "out": str(out),
        "format": arguments.format,
        "model": type(dense).__name__,
        "parameters": count_parameters(dense),
        "parameters_low_rank": count_parameters(model),
        "largest_change_of_a_logit": float(change),
        "tokens_compared": length,
    }
    return with_notes(result, notes)


def show(result: dict[str, Any]) -> None:
    """Says what was written."""
    print(
        f"{result['out']}: a plain {result['model']} of {result['parameters']:,} parameters "
        f"({result['parameters_low_rank']:,} at low rank); largest change of a logit "
        f"{result['largest_change_of_a_logit']:.1e} over {result['tokens_compared']} random tokens"
    )
