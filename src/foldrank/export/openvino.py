"""A folded model in OpenVINO's own form, made of its ONNX graph, for `foldrank.runtime` and OpenVINO's tools."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldrank.atomic import new_folder
from foldrank.export.onnx import GRAPH, SETTINGS, export_onnx
from foldrank.extras import needed
from foldrank.hf.foreign import foreign
from foldrank.structured import to_json

XML = "model.xml"


def export_openvino(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> int:
    """Writes the model in float32, its tokenizer and what the runtime must know, whole or not at all.

    Arguments and errors as of `export_onnx`.

    Returns:
        Bytes of the graph and its weights.
    """
    openvino = needed("openvino", "export to OpenVINO", extra="openvino")
    with TemporaryDirectory() as temporary, new_folder(out) as work:
        onnx = Path(temporary) / "onnx"
        export_onnx(model, tokenizer, onnx)
        with foreign(f"OpenVINO cannot convert this {type(model).__name__}"):
            # By itself it halves the weights.
            openvino.save_model(openvino.convert_model(onnx / GRAPH), work / XML, compress_to_fp16=False)
        for file in onnx.iterdir():
            if not file.name.startswith(GRAPH):
                shutil.copy(file, work)
        settings = json.loads((onnx / SETTINGS).read_text("utf-8")) | {"format": "openvino"}
        (work / SETTINGS).write_text(to_json(settings, indent=2) + "\n")
        return sum(file.stat().st_size for file in (work / XML, (work / XML).with_suffix(".bin")))
