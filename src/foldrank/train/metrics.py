"""What a run measured: what `pretrain` returns, `metrics.json` holds, and studies, reports and commands read."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from foldrank.atomic import write_text
from foldrank.structured import read_json_table, to_json

SCHEMA = 1
"""Version of metrics.json."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationPoint:
    """One evaluation while the model trained."""

    step: int
    """Optimizer steps before it."""

    tokens: int
    """Training tokens before it."""

    seconds: float | None = None
    """Seconds of training before it, without evaluations; None where the run was interrupted."""

    train_loss: float | None = None
    """Mean since the evaluation before, in nats per token; None where nothing was logged."""

    val_loss: float
    """Nats per predicted token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunMetrics:
    """What a finished run measured."""

    recipe: str
    """Name of the recipe."""

    seed: int
    """Seed of the initial weights and of the order of the data."""

    params: int
    """Parameters of the folded model."""

    params_dense: int
    """Parameters of the dense model of the same shape."""

    params_blocks: int | None = None
    """Those of the folded model's attention and MLP layers, without embedding, head and norms; None in files of
    foldrank 0.1."""

    steps: int
    """Optimizer steps."""

    tokens: int
    """Training tokens, padding left out."""

    flops_per_token: int
    """FLOPs of training, forward and backward (train/accounting.py)."""

    flops: int
    """FLOPs of the whole training."""

    memory_bytes: Mapping[str, int]
    """The plan's bytes at the peak of a step, by part."""

    tokens_by_source: Mapping[str, int] = field(default_factory=dict)
    """Of these the tokens of each source of a mixture; empty of anything else."""

    train_tokens_available: int | None = None
    """Tokens of the training split; None of a stream."""

    text_sha256: str | None = None
    """Hash of the text that the data was made of; None of a stream."""

    tokenizer_sha256: str | None = None
    """Hash of the tokenizer; None in files of foldrank 0.1."""

    lineage: Sequence[str] = ()
    """Where the weights come from, if not from a start of its own, in sentences, oldest first."""

    resumed_at_step: int = 0
    """The step of the checkpoint from which the run went on the last time; 0 where it never did."""

    seconds: float
    """Seconds of training since it began or went on, without evaluations."""

    tokens_per_second: float
    """Training tokens in these seconds, over them."""

    start_loss: float | None = None
    """Of the first batch's sequences, of 32 at most, before the first step, in nats per predicted token; None of a
    stream."""

    start_loss_without_residual: float | None = None
    """The same without the residual: what it does to the start; None where there is none, or where layers are split,
    which folds it before."""

    micro_batch_size: int | None = None
    """Sequences of a forward pass on one device; None in files of foldrank 0.1."""

    mfu: float | None = None
    """Model FLOPs utilization: FLOPs a second over `peak_flops` of all devices (arXiv 2204.02311); None without."""

    peak_flops: float | None = None
    """FLOP/s that one device can reach; None where that is not known."""

    peak_memory_bytes: int | None = None
    """The most that was allocated on one GPU while training, beside the plan's `memory_bytes`; None on a CPU."""

    val_tokens: int
    """Predicted tokens of the validation."""

    val_loss: float
    """Before the fold, in nats per predicted token."""

    val_perplexity: float | None
    """exp(val_loss); None where that is no finite number."""

    val_loss_folded: float
    """After the fold, in nats per predicted token."""

    val_perplexity_folded: float | None
    """exp(val_loss_folded); None where that is no finite number."""

    val_loss_by_source: Mapping[str, float] = field(default_factory=dict)
    """After the fold, of each source of a mixture; empty of anything else."""

    test_tokens: int | None = None
    """Predicted tokens of the test; None without one."""

    test_loss: float | None = None
    """Of the folded model on the test, in nats per predicted token."""

    test_perplexity: float | None = None
    """exp(test_loss); None where that is no finite number."""

    folded_layers: int
    """Layers that had a residual or a scale."""

    fold_max_abs_weight_rounding: float
    """Largest rounding error of a folded weight, against the sum in float64."""

    fold_weight_rounding: Mapping[str, float]
    """The same by layer."""

    effective_ranks: Mapping[str, float] = field(default_factory=dict)
    """Of the deployed matrix of each layer of the blocks (train/effective_rank.py), without dense ones and SLTrain's
    above a width of 1,024; empty in files of foldrank 0.1."""

    fold_max_abs_logit_drift: float
    """Largest change of a logit by the fold, on the first validation sequences."""

    fold_argmax_agreement: float
    """Fraction of these positions whose most likely next token is the same before and after."""

    history: Sequence[EvaluationPoint]
    """The evaluations while it trained."""

    sample: str
    """Text that the folded model wrote."""

    device: str
    """Where it trained, in PyTorch's words."""

    threads: int
    """Threads of the CPU."""

    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of Python and of the packages."""

    commit: str | None = None
    """Git commit of foldrank's source tree."""

    study_seconds: float | None = None
    """In a study: seconds of the whole run, evaluations and fold included; None elsewhere."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, with the version of the file; `from_dict` is the way back."""
        return {"schema": SCHEMA, **dataclasses.asdict(self), "lineage": list(self.lineage)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunMetrics":
        """The metrics with these values; what an older file lacks takes its default.

        Raises:
            ValueError: one line that names what is missing or of the wrong type.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            return _ADAPTER.validate_python({name: value for name, value in values.items() if name in known})
        except ValidationError as error:
            problems = (f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()[:3])
            raise ValueError("; ".join(problems)) from error

    @classmethod
    def read(cls, file: Path) -> "RunMetrics":
        """What a `metrics.json` holds.

        Raises:
            ValueError: naming the file, where it cannot be read as one.
        """
        try:
            return cls.from_dict(read_json_table(file))
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}") from error

    def write(self, file: Path) -> None:
        """Writes a `metrics.json`, whole or not at all.

        Raises:
            OSError: where it cannot be written.
        """
        write_text(file, to_json(self.to_dict(), indent=2) + "\n")


def perplexity_of(loss: float) -> float:
    """exp(loss), infinite where no float holds it."""
    return math.exp(loss) if loss < 700 else math.inf


_ADAPTER = TypeAdapter(RunMetrics)
