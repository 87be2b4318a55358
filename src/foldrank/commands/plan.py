"""`foldrank plan`: what a recipe will cost, computed from shapes."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from foldrank.commands.arguments import add_gpu_arguments, mfu_of, number, whole_number
from foldrank.commands.recipe_arguments import add_recipe_arguments, recipe_from
from foldrank.console import console
from foldrank.data.config import MULTIPLE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from foldrank.recipes.schema import Recipe

H100_PEAK_FLOPS = 989e12
"""FLOP/s of an H100 SXM in bfloat16 without sparsity (NVIDIA H100 datasheet)."""

GIB = 1 << 30

H100_MEMORY_BANDWIDTH = 3.35e12
"""Bytes a second between an H100 SXM and its memory (NVIDIA H100 datasheet)."""

ASSUMPTIONS = (
    "FLOPs: 6 N + 12 L d T per token (PaLM, appendix B, arXiv 2204.02311), N the weights of the matrices that "
    "multiply, of a low-rank layer its two factors; where blocks are computed again they count 8 N "
    "(arXiv 2104.04473), their down-projections 6 N where the latents are kept (CoLA-M, arXiv 2502.10940).",
    "Hours: FLOPs over GPUs x peak x MFU, activation checkpointing included; evaluation and saving not. Where "
    "layers are split all products count as shared out; those with the head, and with factors that are not split, each "
    "GPU does whole, so that hours and seconds are lower bounds there.",
    "Memory: an upper bound without the allocator's fragmentation and the CUDA context, so leave room. float32 "
    "weights, gradients and averages of the optimizer (arXiv 1910.02054); activations as autograd keeps them with a "
    "flash attention kernel and no mask, or with a mask in each block where documents are kept apart (on a GPU that is "
    "more than FlexAttention keeps). FSDP shards everything, each block a unit (arXiv 2304.11277).",
    "Seconds of a step, with --bandwidth: of products, FLOPs over peak x MFU; of memory, weights read in each pass, "
    "activations written and read once, weights, gradients and averages read and written by the optimizer; of the "
    "wire, what a ring sends (foldrank/train/wire.py). A step takes at least the largest of the three.",
    "All formulas, with sources and assumptions: foldrank/train/accounting.py.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command line."""
    parser.description = (
        "What training a recipe will cost: parameters, FLOPs, memory per GPU, hours. Nothing is allocated and no data "
        "is read."
    )
    add_recipe_arguments(parser)
    add_gpu_arguments(parser)
    parser.add_argument(
        "--gpu-memory", type=number(0, 1 << 20), metavar="GIB", help="memory of a GPU, to say whether the run fits"
    )
    parser.add_argument(
        "--peak-flops",
        type=number(0),
        default=H100_PEAK_FLOPS,
        metavar="FLOPS",
        help="FLOP/s of one GPU, without sparsity (default: 989e12, an H100 SXM in bfloat16 by NVIDIA's datasheet)",
    )
    parser.add_argument(
        "--sharding", choices=("none", "fsdp"), help="short for --train.sharding; where it is left out, both are shown"
    )
    parser.add_argument(
        "--tensor-parallel",
        type=whole_number(1, 1 << 10),
        metavar="N",
        help="short for --train.tensor_parallel, of as many GPUs, or with fsdp of a multiple; with a residual also "
        "--train.fold_at_start",
    )
    parser.add_argument(
        "--bandwidth",
        type=number(0),
        metavar="GB/S",
        help="10^9 bytes a second that a GPU sends to the others: adds the seconds of a step, beside a dense model's",
    )
    parser.add_argument(
        "--memory-bandwidth",
        type=number(0),
        default=H100_MEMORY_BANDWIDTH / 1e9,
        metavar="GB/S",
        help="10^9 bytes a second between a GPU and its memory (default: 3350, an H100 SXM by NVIDIA's datasheet)",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Computes the plan."""
    from foldrank.recipes.train_config import Checkpointing
    from foldrank.train.accounting import evaluation_memory, factors, memory, parameters, training_flops
    from foldrank.train.activation_checkpointing import without_latents
    from foldrank.train.model import check_recipe, dense_parameters, shape_of
    from foldrank.train.optimizer_cost import optimizer_flops
    from foldrank.train.sharding import check_processes
    from foldrank.train.step_time import beside_dense

    gpus, peak, mfu, limit = arguments.gpus, arguments.peak_flops, mfu_of(arguments), arguments.gpu_memory
    speeds = (peak, arguments.memory_bandwidth, *(each for each in (limit, arguments.bandwidth) if each is not None))
    if not all(speed > 0 for speed in speeds):
        raise ValueError("--peak-flops, --gpu-memory, --bandwidth and --memory-bandwidth must be above 0")
    recipe = recipe_from(arguments)
    if arguments.sharding is not None:
        recipe = recipe.override({"train.sharding": arguments.sharding})
    if arguments.tensor_parallel is not None:
        # What is split has no residual.
        folded = recipe.low_rank is not None and recipe.low_rank.residual is not None
        settings = {"train.tensor_parallel": arguments.tensor_parallel, "train.fold_at_start": folded}
        recipe = recipe.override(settings)
    train = recipe.train
    shares = check_processes(train, gpus)
    check_recipe(recipe)
    model = shape_of(recipe)
    ways: list[Checkpointing | None] = [None, "block"] if without_latents(model) else [None, "latents", "block"]
    trained = parameters(model)
    tokens_per_step = train.batch_size * train.sequence_length
    micro_batch = train.resolve_micro_batch_size(shares)

    flops, uses, steps, update = [], [], [], optimizer_flops(model, train)
    recipes = {way: recipe.override({"train.activation_checkpointing": way}) for way in ways}
    for checkpointing, way in recipes.items():
        per_token = training_flops(way, gpus=shares)
        per_step = per_token.total * tokens_per_step
        # Of the optimizer, every GPU does all of it.
        of_a_gpu = per_step / gpus + update
        flops.append(
            {
                "activation_checkpointing": checkpointing,
                "per_token": {**per_token.parts(), "total": per_token.total},
                "per_step": per_step,
                "optimizer_per_step": update,
                "hours": of_a_gpu * train.steps / (peak * mfu) / 3600,
            }
        )
    both = gpus > 1 and train.tensor_parallel == 1 and arguments.sharding is None
    for sharding in ("none", "fsdp") if both else (train.sharding,):
        for checkpointing, way in recipes.items():
            way = way.override({"train.sharding": sharding})
            how = {"strategy": _strategy(way, gpus), "activation_checkpointing": checkpointing}
            used, evaluation = memory(way, gpus=shares), evaluation_memory(way, gpus=shares)
            uses.append(
                {
                    **how,
                    "bytes_per_gpu": {**used.parts(), "total": used.total},
                    "bytes_per_gpu_in_evaluation": evaluation,
                    "fits": None if limit is None else max(used.total, evaluation) <= limit * GIB,
                }
            )
            if arguments.bandwidth:
                rates = {"memory": 1e9 * arguments.memory_bandwidth, "bandwidth": 1e9 * arguments.bandwidth}
                steps += [how | row for row in beside_dense(way, gpus=gpus, flops=peak * mfu, **rates)]
    return {
        "recipe": Path(arguments.recipe).stem,
        "parameters": {**trained.parts(), "total": trained.total},
        "low_rank_parameters": factors(model),
        "dense_parameters": dense_parameters(recipe),
        "steps": train.steps,
        "sequences_per_step": train.batch_size,
        "sequence_length": train.sequence_length,
        "tokens_per_step": tokens_per_step,
        "tokens": tokens_per_step * train.steps,
        "gpus": gpus,
        "micro_batch_size": micro_batch,
        "accumulation_steps": train.batch_size // (shares * micro_batch),
        "dtype": train.dtype,
        "gpu_memory_gib": limit,
        "peak_flops": peak,
        "mfu": mfu,
        "flops": flops,
        "memory": uses,
        "steps_seconds": steps,
        "assumptions": [*ASSUMPTIONS],
        "notes": _vocabulary_note(model),
    }


def _strategy(recipe: "Recipe", gpus: int) -> str:
    if gpus == 1:
        return "one GPU"
    sharded, split = recipe.train.sharding == "fsdp", recipe.train.tensor_parallel > 1
    return ", ".join([*(["FSDP"] if sharded else []), *(["split"] if split else [])]) or "DDP"


def _vocabulary_note(model: "PreTrainedModel") -> list[str]:
    """What filling the vocabulary up to a multiple of 64 would cost, where it is none."""
    entries, width = model.config.vocab_size, model.config.hidden_size
    missing = -entries % MULTIPLE
    if not missing:
        return []
    matrices = 1 if model.config.tie_word_embeddings else 2
    return [
        f"The vocabulary has {entries:,} entries, no multiple of {MULTIPLE}: with --model.vocab_size "
        f"{entries + missing} products with embedding and head would fill a GPU's tiles, for "
        f"{matrices * missing * width:,} more parameters."
    ]


def show(result: dict[str, Any]) -> None:
    """Prints the tables."""
    out = console()
    total = result["parameters"]["total"]
    table = Table(title=f"{result['recipe']}: parameters", title_justify="left", show_header=False)
    for justify in ("left", "right", "right"):
        table.add_column(justify=justify)
    for part, count in result["parameters"].items():
        table.add_row(part, f"{count:,}", f"{count / total:.1%}", end_section=part in ("head", "total"))
    for part, count in result["low_rank_parameters"].items():
        table.add_row(f"in low-rank layers: {part}", f"{count:,}", f"{count / total:.1%}")
    table.add_row("dense model of this shape", f"{result['dense_parameters']:,}", "")
    out.print(table)

    out.print(
        f"{result['steps']:,} steps of {result['sequences_per_step']:,} sequences of {result['sequence_length']:,}: "
        f"{result['tokens_per_step']:,} tokens a step, {result['tokens']:,} in all, padding included.\n"
        f"GPUs: {result['gpus']}. Sequences per forward pass on each: {result['micro_batch_size']}. "
        f"Passes a step: {result['accumulation_steps']}. Products in {result['dtype']}.\n"
    )
    flops, uses = result["flops"], result["memory"]
    table = _columns("FLOPs per token", flops)
    for part in flops[0]["per_token"]:
        amounts = (f"{way['per_token'][part]:.4g}" for way in flops)
        table.add_row(part, *amounts, end_section=part in ("recomputed", "total"))
    table.add_row("per step", *(f"{way['per_step']:.4g}" for way in flops))
    if flops[0]["optimizer_per_step"]:
        table.add_row("of the optimizer, per step", *(f"{way['optimizer_per_step']:.4g}" for way in flops))
    label = f"hours at {result['mfu']:.0%} of {result['peak_flops'] / 1e12:,.5g} TFLOP/s per GPU"
    table.add_row(label, *(f"{way['hours']:,.2f}" if way["hours"] >= 0.01 else "< 0.01" for way in flops))
    out.print(table)

    table = _columns("memory, GiB per GPU", uses)
    for part in uses[0]["bytes_per_gpu"]:
        amounts = (f"{use['bytes_per_gpu'][part] / GIB:,.3f}" for use in uses)
        table.add_row(part.replace("_", " "), *amounts, end_section=part in ("transient", "total"))
    evaluations = (f"{use['bytes_per_gpu_in_evaluation'] / GIB:,.3f}" for use in uses)
    table.add_row("an evaluation", *evaluations, end_section=True)
    if (limit := result["gpu_memory_gib"]) is not None:
        table.add_row(f"fits in {limit:g}", *("yes" if use["fits"] else "no" for use in uses))
    out.print(table)
    if result["steps_seconds"]:
        table = Table(title="seconds of a step, at least", title_justify="left")
        for column in ("", "products", "memory", "wire", "GB sent", "at least", "over dense"):
            table.add_column(column, justify="right" if column else "left", no_wrap=bool(column))
        for step in result["steps_seconds"]:
            how = (step["strategy"], step["activation_checkpointing"], step["model"])
            seconds = (f"{step[name]:.3g}" for name in ("products", "memory", "wire"))
            over = "" if step["over_dense"] is None else f"{step['over_dense']:.2f}"
            sent = f"{step['bytes_sent'] / 1e9:.3g}"
            table.add_row(" ".join(filter(None, how)), *seconds, sent, f"{step['at_least']:.3g}", over)
        out.print(table)
    for assumption in result["assumptions"]:
        out.print(assumption, style="dim")


def _columns(title: str, ways: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{title} (checkpointing: none, latents, block)", title_justify="left")
    table.add_column(no_wrap=True)
    for way in ways:
        labels = way.get("strategy", ""), way["activation_checkpointing"] or ""
        table.add_column("\n".join(filter(None, labels)), justify="right", vertical="bottom")
    return table
