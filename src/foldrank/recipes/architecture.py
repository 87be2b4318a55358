"""An architecture of transformers by its `config.json`: read, fields of it replaced, and what a recipe asks of one.

    FOLDER, FILE or NAME -> its fields, but those of a tokenizer or of other weights -> `model.config` of the recipe

What a recipe keeps are the fields, so that a run needs the file no more. transformers is not imported: which families
there are, and what their fields may be, is checked where the model is built (train/model.py).
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foldrank.hub import download
from foldrank.structured import read_json_table

OF_OTHERS = (
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "_attn_implementation",
)
"""Fields that say something of a tokenizer, or of weights: a recipe has its own."""

NAMES = {
    "hidden_size": ("hidden_size", "n_embd"),
    "intermediate_size": ("intermediate_size", "n_inner"),
    "num_layers": ("num_hidden_layers", "n_layer"),
    "num_heads": ("num_attention_heads", "n_head"),
    "num_key_value_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
}
"""From a setting of a recipe's short form to what families call it."""


def read_architecture(where: str) -> dict[str, Any]:
    """The fields of a `config.json`, given its folder, itself, or the name of a model on the hub.

    Raises:
        ValueError: where there is none, it cannot be read, or it is of a low-rank or a quantized model.
    """
    fields = read_json_table(_file(where))
    if not isinstance(fields.get("model_type"), str):
        raise ValueError(f"model.config {where}: it has no model_type, which says the family")
    if fields.get("low_rank") is not None:
        raise ValueError(
            f"model.config {where}: it is of a low-rank model; name the config of the dense one, or start from the "
            "weights of this one (--init-from)"
        )
    if fields.get("quantization_config") is not None:
        raise ValueError(f"model.config {where}: it is of quantized weights, which are not trained here")
    return {name: value for name, value in fields.items() if name not in OF_OTHERS}


def replaced(fields: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with some replaced; where there are fewer blocks, lists of one entry for each block are cut.

    Raises:
        ValueError: for a name that is no field there.
    """
    for name in by:
        if name not in fields:
            near = ", ".join(difflib.get_close_matches(name, fields, n=3, cutoff=0))
            raise ValueError(f"model.fields: the config has no field {name!r} to replace; the nearest are {near}")
    before, after = (_read(each, "num_layers") for each in (fields, {**fields, **by}))
    lists = {name: value for name, value in fields.items() if isinstance(value, list | tuple) and len(value) == before}
    cut = {name: value[:after] for name, value in lists.items()} if isinstance(after, int) else {}
    return {name: _with_lists(value) for name, value in {**fields, **cut, **by}.items()}


def with_layers(fields: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The fields of the same architecture with so many blocks."""
    return replaced(fields, {next(name for name in NAMES["num_layers"] if name in fields): count})


def short_form(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a recipe's short form that these fields say.

    Raises:
        ValueError: naming what is missing or no whole number.
    """
    form = {name: _read(fields, name) for name in NAMES}
    if form["intermediate_size"] is None and isinstance(form["hidden_size"], int):
        form["intermediate_size"] = 4 * form["hidden_size"]  # GPT-2's, where n_inner is null
    problems = [
        f"{' or '.join(names)} must be a whole number, got {form[name]!r}"
        for name, names in NAMES.items()
        if type(form[name]) is not int
        and (form[name] is not None or name in ("hidden_size", "num_layers", "num_heads"))
    ]
    if problems:
        raise ValueError(f"model.config: {'; '.join(problems)}")
    return form


def _with_lists(value: Any) -> Any:
    """As JSON has it: settings come with tuples in place of lists."""
    if isinstance(value, Mapping):
        return {name: _with_lists(entry) for name, entry in value.items()}
    return [_with_lists(entry) for entry in value] if isinstance(value, list | tuple) else value


def _read(fields: Mapping[str, Any], setting: str) -> Any:
    return next((fields[name] for name in NAMES[setting] if fields.get(name) is not None), None)


def _file(where: str) -> Path:
    path = Path(where)
    if path.is_dir():
        return path / "config.json"
    if path.exists() or re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", where) is None:
        return path
    try:
        return download(where, ["config.json"]) / "config.json"
    except ValueError as error:
        raise ValueError(f"model.config: there is no such file here; on the hub {error}") from error
