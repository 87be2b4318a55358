"""What a fine-tuning measured: what `finetune` returns and `metrics.json` holds."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foldrank.atomic import write_text
from foldrank.structured import to_json


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneMetrics:
    """A field with a unit each."""

    task: str
    data: str
    data_sha256: str
    """Of the examples, training and held out."""
    checkpoint: str
    """Which was fine-tuned."""
    state: str
    """dense, folded or unfolded."""
    seed: int
    training_examples: int
    held_out_examples: int
    held_out_tokens: int | None
    """Labels that count, of a language task."""
    cut: int
    """Examples that were longer than the sequence length."""
    left_out: int
    """Examples of which no label was within it."""
    sequence_length: int
    steps: int
    seconds: float
    """Of training; since it went on, where the run was interrupted."""
    params: int
    params_trained: int
    before: Mapping[str, float]
    """Of the held-out examples before any step; of a classification with a new head."""
    after: Mapping[str, float]
    labels: tuple[str, ...] | None
    versions: Mapping[str, str]
    commit: str | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)

    def write(self, file: Path) -> None:
        """Writes a `metrics.json`, whole or not at all."""
        write_text(file, to_json(self.to_dict(), indent=2) + "\n")
