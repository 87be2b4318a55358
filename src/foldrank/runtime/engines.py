"""What runs an exported graph on the CPU, each behind the same three calls: ONNX Runtime, and OpenVINO."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

CACHE = "input.past_key_values."
"""How the names of the cache's inputs begin; its outputs come in the same order, after the logits."""


class Engine(Protocol):
    """A graph that was read. A cache is what `run` returned, whatever it is made of."""

    def empty_cache(self, batch: int, heads: int, size: int) -> list[Any]:
        """A cache without tokens: keys and values of each layer, (batch, heads, 0, size)."""
        ...

    def run(self, feeds: Mapping[str, NDArray], cache: Sequence[Any]) -> tuple[NDArray, list[Any]]:
        """Logits in float32, and the cache that grew."""
        ...


class OnnxRuntime:
    """ONNX Runtime: `model.onnx`."""

    graph = "model.onnx"

    def __init__(self, file: Path, threads: int | None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Both keep memory for the next step, which is a longer one.
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        if threads is not None:
            options.intra_op_num_threads = threads
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._caches = [value.name for value in self._session.get_inputs() if value.name.startswith(CACHE)]

    def empty_cache(self, batch: int, heads: int, size: int) -> list[Any]:
        return [self._value(np.zeros((batch, heads, 0, size), np.float32)) for _ in self._caches]

    def run(self, feeds: Mapping[str, NDArray], cache: Sequence[Any]) -> tuple[NDArray, list[Any]]:
        values: dict[str, Any] = {name: self._value(array) for name, array in feeds.items()}
        values |= dict(zip(self._caches, cache, strict=True))
        logits, *grown = self._session.run_with_ort_values(self._outputs, values)
        return logits.numpy(), grown


class OpenVino:
    """OpenVINO: `model.xml`. It computes in float32, where it would take what the processor is fastest at."""

    graph = "model.xml"

    def __init__(self, file: Path, threads: int | None) -> None:
        how: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            how["INFERENCE_NUM_THREADS"] = threads
        compiled = import_module("openvino").Core().compile_model(str(file), "CPU", how)
        self._request = compiled.create_infer_request()
        self._caches = [port.any_name for port in compiled.inputs if port.any_name.startswith(CACHE)]

    def empty_cache(self, batch: int, heads: int, size: int) -> list[Any]:
        return [np.zeros((batch, heads, 0, size), np.float32) for _ in self._caches]

    def run(self, feeds: Mapping[str, NDArray], cache: Sequence[Any]) -> tuple[NDArray, list[Any]]:
        # What it returns, it writes over in the next step.
        outputs = self._request.infer({**feeds, **dict(zip(self._caches, cache, strict=True))})
        logits, *grown = (np.array(array) for array in outputs.values())
        return logits, grown


ENGINES: dict[str, tuple[str, type[OnnxRuntime | OpenVino]]] = {
    "onnx": ("onnxruntime", OnnxRuntime),
    "openvino": ("openvino", OpenVino),
}
"""From the format of an exported model to the package that runs it, and how."""
