"""Rows of Hugging Face data sets, by name or from a local folder, streamed."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foldrank.data.config import DataConfig
from foldrank.data.files import missing_field
from foldrank.extras import needed
from foldrank.hub import is_reachable

SAVED = ("dataset_dict.json", "state.json")
"""Files by which a folder that `save_to_disk` wrote is known."""


def is_data_set(config: DataConfig) -> bool:
    """Whether `source` is for the `datasets` library: a name on the hub, a saved data set, or a folder with splits."""
    path = Path(config.source)
    if path.is_dir():
        asked = config.subset or config.split or config.validation_split
        return bool(asked) or any((path / name).exists() for name in SAVED)
    return not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", config.source) is not None


def rows(config: DataConfig, split: str, field: str) -> Iterator[tuple[object, float | None]]:
    """A field of the rows of a split, each with the share of the split that it ends, where their number is known.

    Raises:
        ValueError: for a data set, subset, split or field that does not exist, or where `datasets` is not installed.
    """
    what = f"{config.source!r} as a Hugging Face data set (it is no file or folder of text here)"
    datasets = needed("datasets", f"reading {what}")
    try:
        data, total = _load(datasets, config, split)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"cannot read {what}: {error}") from error
    names = data.column_names
    if names is not None:
        if field not in names:
            raise ValueError(missing_field(config.source, field, names))
        data = data.select_columns([field])
    for number, row in enumerate(data, start=1):
        if number == 1 and field not in row:
            raise ValueError(missing_field(config.source, field, row))
        yield row.get(field), number / total if total else None


def _load(datasets: Any, config: DataConfig, split: str) -> tuple[Any, int | None]:
    if any((Path(config.source) / name).exists() for name in SAVED):
        saved = datasets.load_from_disk(config.source)
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"it has no split {split!r} but {', '.join(saved)}")
            saved = saved[split]
        elif config.validation_split is not None:
            raise ValueError("it has no splits")
        return saved, len(saved)
    name, _, revision = config.source.partition("@")
    if not Path(name).exists() and not is_reachable():  # its library tries for half a minute
        raise ValueError("the hub cannot be reached")
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        data = datasets.load_dataset(name, config.subset, split=split, streaming=True, revision=revision or None)
    finally:
        if not quiet:
            datasets.enable_progress_bars()
    known = (data.info.splits or {}).get(split)
    return data, known.num_examples if known is not None else None
