"""What is kept of a run: one small JSON file, written once, from which all tables are made."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from foldrank.atomic import write_text
from foldrank.structured import read_json_table, to_json
from foldrank.train.metrics import RunMetrics

SCHEMA = 1
"""Version of a record."""

Stage = Literal["rung", "sweep", "final"]
"""A run that helps to choose a learning rate, up to a step at which the worse half stops or as a whole; or one that is
compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A run that finished or failed."""

    id: str
    """Name of the run, of its record, and of its folder under `runs/`."""

    corpus: str
    size: str
    method: str
    stage: Stage
    learning_rate: float
    seed: int

    until: int | None = None
    """Step up to which a rung goes."""

    val_loss: float | None = None
    """Validation loss of a rung, before the fold."""

    error: str | None = None
    """Why the run failed, one line; None for one that finished."""

    metrics: RunMetrics | None = None
    """What the run measured; None for a run that failed."""

    spectra: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Singular values of each layer's whole matrix in the folded model, largest first, by layer name; of a low-rank
    layer those of B A, whatever stands between the factors. Only of the first seed of a method's final runs."""

    finetuned: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What the fine-tunings of its folded model measured, by their names in the study; of one that failed, `error`."""

    recipe: Mapping[str, Any] = field(default_factory=dict)
    """All settings of the run."""

    @property
    def loss(self) -> float | None:
        """Validation loss by which rates are chosen: of a rung at its step, of a whole run folded; None of failures."""
        if self.stage == "rung":
            return self.val_loss
        return self.measured.val_loss_folded if self.finished else None

    @property
    def measured(self) -> RunMetrics:
        """What a run that finished measured."""
        assert self.metrics is not None
        return self.metrics

    @property
    def finished(self) -> bool:
        """Whether the run finished."""
        return self.error is None and self.metrics is not None

    def tuned(self, task: str) -> Mapping[str, Any] | None:
        """What a fine-tuning measured; None where there was none, or it failed."""
        figures = self.finetuned.get(task)
        return None if figures is None or "error" in figures else figures


def write_record(study: Path, record: Record) -> None:
    """Keeps a record, whole or not at all."""
    folder = study / "records"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{record.id}.json", to_json(_to_dict(record), indent=1) + "\n")


def _to_dict(record: Record) -> dict[str, Any]:
    metrics = {} if record.metrics is None else record.metrics.to_dict()
    return {"schema": SCHEMA, **asdict(replace(record, metrics=None)), "metrics": metrics}


def read_records(study: Path) -> dict[str, Record]:
    """All records of a study's folder by run, in the order of their names.

    Raises:
        ValueError: naming a file that is no record.
    """
    records = {}
    for file in sorted((study / "records").glob("*.json")):
        try:
            entries = read_json_table(file)
            if entries.pop("schema") != SCHEMA:
                raise ValueError("it is of another version of foldrank")
            metrics = entries.pop("metrics", None)
            record = Record(**entries, metrics=RunMetrics.from_dict(metrics) if metrics else None)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no record of a run ({error}): delete it, and the run is run again") from error
        records[record.id] = record
    return records
