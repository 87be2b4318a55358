"""A folded model as an ONNX graph with a key-value cache, through transformers' exporter, for `foldrank.runtime`.

One graph does all: with an empty cache it reads a prompt, with a filled one it goes on by a token or more, and it gives
the logits of those positions that are asked for. int8 is ONNX Runtime's dynamic quantization of the weights.
"""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from foldrank.atomic import new_folder
from foldrank.core.inventory import low_rank_layers
from foldrank.extras import needed
from foldrank.hf.foreign import foreign
from foldrank.structured import to_json

Precision = Literal["float32", "int8"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

GRAPH, SETTINGS = "model.onnx", "runtime.json"

SCHEMA = 1
"""Version of runtime.json."""


def export_onnx(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, *, precision: Precision = "float32"
) -> int:
    """Writes the model, its tokenizer and what the runtime must know, whole or not at all.

    Args:
        model: folded or dense, in float32, on the CPU.
        tokenizer: with a `tokenizer.json`.
        out: new folder.
        precision: of the weights; int8 with one scale a column.

    Returns:
        Bytes of the graph and its weights.

    Raises:
        ValueError: for an unfolded model, an architecture that cannot be exported, a slow tokenizer, and where a
            package is missing.
        OSError: where something cannot be written.
    """
    if any(layer.weight_parametrizations for layer in low_rank_layers(model).values()):
        raise ValueError("the model is unfolded: fold it first (foldrank fold)")
    if not tokenizer.is_fast:
        raise ValueError("the tokenizer has no tokenizer.json, which the runtime reads")
    if getattr(model.config, "sliding_window", None) is not None:
        raise ValueError("the model has a sliding window, for which the exported cache knows no end")
    exporters = needed("transformers.exporters.exporter_onnx", "export to ONNX", extra="onnx")
    onnx_ir = needed("onnx_ir", "export to ONNX", extra="onnx")
    onnx = needed("onnx", "export to ONNX", extra="onnx")
    quantization = needed("onnxruntime.quantization", "export to ONNX", extra="onnx")
    shape = cache_shape(model)
    with foreign(f"this {type(model).__name__} cannot be exported to ONNX"), _quiet(), torch.no_grad():
        inputs = _sample_inputs(model, shape)
        shapes = {name: _dynamic(value) for name, value in inputs.items() if not isinstance(value, bool)}
        how = exporters.OnnxConfig(dynamic=True, dynamic_shapes=shapes, ort_fusions="cpu")
        exported = exporters.OnnxExporter().export(model.eval(), inputs, config=how)
        for node in exported.program.graph:
            node.metadata_props.clear()  # where in Python it comes from
    with new_folder(out) as work:
        name = GRAPH if precision == "float32" else "float32.onnx"
        onnx_ir.save(exported.program, str(work / name), external_data=f"{name}.data")
        if precision == "int8":
            with foreign("ONNX Runtime cannot quantize this graph"), _quiet():
                # The shapes that the exporter noted are less than the quantizer finds out itself, and contradict them.
                graph = onnx.load(work / name, load_external_data=False)
                del graph.graph.value_info[:]
                onnx.save(graph, work / name)
                quantization.quantize_dynamic(
                    work / name,
                    work / GRAPH,
                    weight_type=quantization.QuantType.QInt8,
                    per_channel=True,
                    use_external_data_format=True,
                    extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
                )
            (work / f"{GRAPH}.data").chmod((work / GRAPH).stat().st_mode)  # it is written for its owner alone
            for file in work.glob(f"{name}*"):
                file.unlink()
        tokenizer.save_pretrained(work)
        (work / SETTINGS).write_text(to_json(_settings(model, tokenizer, shape, precision), indent=2) + "\n")
        return sum(file.stat().st_size for file in work.glob(f"{GRAPH}*"))


def cache_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Layers, heads and numbers a head, of the keys that a token leaves in the cache."""
    with torch.no_grad():
        cache = model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True).past_key_values
    _, heads, _, size = cache.layers[0].keys.shape
    return len(cache.layers), heads, size


def _sample_inputs(model: PreTrainedModel, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Two rows, of which one is padded, so that nothing is left out of the graph as always being the same."""
    batch, past, new = 2, 3, 2
    layers, heads, size = shape
    cache = DynamicCache(config=model.config)
    for layer in range(layers):
        zeros = torch.zeros(batch, heads, past, size)
        cache.update(zeros, zeros.clone(), layer)
    mask: Tensor = torch.ones(batch, past + new, dtype=torch.int64)
    mask[0, 0] = 0
    return {
        "input_ids": torch.ones(batch, new, dtype=torch.int64),
        "attention_mask": mask,
        "position_ids": torch.arange(past, past + new).repeat(batch, 1),
        "past_key_values": cache,
        "logits_to_keep": torch.arange(new),
        "use_cache": True,
        "return_dict": True,
    }


def _dynamic(value: Tensor | DynamicCache) -> Any:
    """Which axes of an input vary: batch and tokens, and of the cache, in the order of its tensors, batch and past."""
    if isinstance(value, DynamicCache):
        varying = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
        return [varying] * 2 * len(value.layers)
    return dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO)


def _settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shape: tuple[int, int, int], precision: Precision
) -> dict[str, Any]:
    generation = model.generation_config
    ends: Any = generation.eos_token_id if generation is not None else None
    ends = tokenizer.eos_token_id if ends is None else ends
    # Rotary positions have no end.
    rotary = any("rotary" in name for name, _ in model.named_modules())
    return {
        "schema": SCHEMA,
        "format": "onnx",
        "model_type": model.config.model_type,
        "precision": precision,
        "vocab_size": model.config.vocab_size,
        "layers": shape[0],
        "key_value_heads": shape[1],
        "head_size": shape[2],
        "end_tokens": ends if isinstance(ends, list) else [] if ends is None else [ends],
        "trained_length": getattr(model.config, "max_position_embeddings", None),
        "max_positions": None if rotary else getattr(model.config, "max_position_embeddings", None),
        "chat_template": tokenizer.chat_template,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the hundred lines that exporters write about what does not concern their user."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
