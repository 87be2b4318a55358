"""`foldrank export`: a folded checkpoint in a form for other tools."""

import argparse
from pathlib import Path
from typing import Any

from foldrank.commands.arguments import with_notes
from foldrank.commands.checkpoint_arguments import add_checkpoint_arguments

TOKENS = 64
"""On which both models are compared, at most."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command line."""
    parser.description = (
        "Write a checkpoint for other tools. dense: a plain model of its family, W = B A, for tools that know nothing "
        "of low rank (llama.cpp, Ollama, any serving); as large as the dense model again, and possible where nothing "
        "stands between the factors. onnx, openvino: a graph with a key-value cache and its tokenizer, which "
        "foldrank.runtime runs without torch (docs/export.md)."
    )
    add_checkpoint_arguments(parser, "folder of a folded checkpoint")
    parser.add_argument("--format", choices=("dense", "onnx", "openvino"), default="dense", help="default: dense")
    parser.add_argument(
        "--precision", choices=("float32", "int8"), help="of the weights of --format onnx (default: float32)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="new folder")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Exports, and compares with the model that was."""
    from foldrank.atomic import refuse_existing
    from foldrank.core.inventory import count_parameters
    from foldrank.hf.checkpoint import inspect, load

    folder, out = arguments.checkpoint, arguments.out
    wanted = ("folded",) if arguments.format == "dense" else ("folded", "dense")
    if (state := inspect(folder).state) not in wanted:
        raise ValueError(f"{folder} is {state}: export takes a folded checkpoint")
    if arguments.precision is not None and arguments.format != "onnx":
        raise ValueError(f"--precision says something of --format onnx, and the format is {arguments.format}")
    refuse_existing(out, option="--out")
    notes: list[str] = []
    model, tokenizer = load(folder, accept_changes=arguments.accept_changes, tell=notes.append)
    of_format = _dense if arguments.format == "dense" else _graph
    result = {
        "checkpoint": str(folder),
        "out": str(out),
        "format": arguments.format,
        "parameters_low_rank": count_parameters(model),
        **of_format(model, tokenizer, arguments),
    }
    return with_notes(result, notes)


def _dense(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from foldrank.core.inventory import count_parameters
    from foldrank.hf.dense import to_dense
    from foldrank.train.run_folder import save

    dense = to_dense(model)
    ids, logits = _reference(arguments.checkpoint, model)
    with torch.no_grad():
        compared = _compared(dense(input_ids=ids).logits, logits)
    save(dense, tokenizer, arguments.out)
    return {"model": type(dense).__name__, "parameters": count_parameters(dense), **compared}


def _graph(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from foldrank.export.onnx import export_onnx
    from foldrank.export.openvino import export_openvino

    precision = arguments.precision or "float32"
    ids, logits = _reference(arguments.checkpoint, model.float())
    if arguments.format == "onnx":
        size = export_onnx(model, tokenizer, arguments.out, precision=precision)
    else:
        size = export_openvino(model, tokenizer, arguments.out)
    from foldrank.runtime import Model  # its packages are there, or the export had been refused

    compared = _compared(torch.from_numpy(Model(arguments.out).logits(ids.numpy())), logits)
    return {"precision": precision, "bytes": size, **compared}


def _reference(folder: Path, model: Any) -> tuple[Any, Any]:
    """Random tokens, and the logits of the model with which those of the exported one are compared.

    Raises:
        ValueError: where they are not finite, before anything slow begins.
    """
    import torch

    length = min(TOKENS, getattr(model.config, "max_position_embeddings", TOKENS))
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    if not torch.isfinite(logits).all():
        raise ValueError(f"{folder}: its outputs are not finite: its weights hold NaN or infinity")
    return ids, logits


def _compared(logits: Any, reference: Any) -> dict[str, Any]:
    change = float((logits - reference).abs().max())
    return {"largest_change_of_a_logit": change, "tokens_compared": reference.shape[1]}


def show(result: dict[str, Any]) -> None:
    """Says what was written."""
    change = (
        f"largest change of a logit {result['largest_change_of_a_logit']:.1e} over {result['tokens_compared']} random "
        "tokens"
    )
    if result["format"] != "dense":
        name = {"onnx": "ONNX", "openvino": "OpenVINO"}[result["format"]]
        print(
            f"{result['out']}: a graph for {name} in {result['precision']}, {result['bytes']:,} bytes, "
            f"{result['parameters_low_rank']:,} parameters; {change}"
        )
        print(f"let it write: foldrank generate {result['out']} --prompt TEXT, or python -m foldrank.runtime")
        return
    print(
        f"{result['out']}: a plain {result['model']} of {result['parameters']:,} parameters "
        f"({result['parameters_low_rank']:,} at low rank); {change}"
    )
