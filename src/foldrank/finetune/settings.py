"""What is asked of a fine-tuning, in one frozen, checked value."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import TypeAdapter, ValidationError

from foldrank.bounds import Bounds, out_of_bounds
from foldrank.core.config import STRICT
from foldrank.recipes.schema import others_in_place_of_numbers, text_fields
from foldrank.recipes.train_config import OptimizerName

Task = Literal["language", "classification"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneSettings:
    """All settings of a fine-tuning.

    Raises:
        ValueError: naming every field that is out of range.
    """

    __pydantic_config__ = STRICT

    task: Task = "language"
    """language: answers to chats or prompts, or plain text; classification: a label for a text or a pair of texts."""

    data: str
    """A file (.jsonl, .json, .parquet, .csv), a Hugging Face data set by name or folder, `glue/NAME`, or a task that
    ships: `stdlib-summaries` (language) and `stdlib-packages` (classification)."""

    held_out: str | None = None
    """A file with the held-out examples; None: the validation split of a data set, or a share of `data`."""

    held_out_fraction: Annotated[float, Bounds(0, 0.9, above=True)] = 0.1
    """Share of the examples that is held out, by a hash of their content, where nothing else is."""

    max_examples: Annotated[int | None, Bounds(1, 10**9)] = None
    """Training examples at most, the first ones; None: all."""

    train_on_prompt: bool = False
    """Count the loss of prompts and questions too, not of the answers alone."""

    sequence_length: Annotated[int | None, Bounds(2, 1 << 20)] = None
    """Tokens of an example at most, longer ones are cut; None: the length that the checkpoint was trained at."""

    epochs: Annotated[float, Bounds(0, 10**6, above=True)] = 3.0
    """Passes over the training examples."""

    batch_size: Annotated[int, Bounds(1, 1 << 16)] = 32
    """Examples per step, over all processes."""

    micro_batch_size: Annotated[int, Bounds(1, 1 << 16)] = 8
    """Examples in one forward pass at most."""

    learning_rate: Annotated[float, Bounds(0, 100, above=True)] = 3e-4
    """Peak; after a linear warm-up it falls linearly to zero."""

    warmup_ratio: Annotated[float, Bounds(0, 1)] = 0.05
    """Share of the steps."""

    optimizer: OptimizerName = "adamw"
    """adamw, or one of those for factors (docs/optimizers.md)."""

    weight_decay: Annotated[float, Bounds(0, 100)] = 0.0
    """Decoupled, of matrices."""

    max_grad_norm: Annotated[float, Bounds(0, 10**6, above=True)] = 1.0
    """Norm to which the gradient is clipped."""

    lora_rank: Annotated[int | None, Bounds(1, 1 << 16)] = None
    """Train LoRA adapters of this rank on the factors (of a dense model: on its linear layers), merged at the end;
    None: train all weights."""

    log_every: Annotated[int, Bounds(1, 10**9)] = 10
    """Steps."""

    save_every: Annotated[int, Bounds(1, 10**9)] = 100
    """Steps between checkpoints, from which an interrupted run goes on."""

    keep_checkpoints: Annotated[int, Bounds(1, 10**6)] = 1
    """The newest so many."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast over float32 weights."""

    device: Literal["auto", "cpu"] = "auto"
    """auto: an accelerator where there is one."""

    seed: Annotated[int, Bounds(0, (1 << 32) - 1)] = 0
    """Of the order of the examples, a new head and new adapters."""

    def __post_init__(self) -> None:
        problems = out_of_bounds(self)
        if not self.data:
            problems.append("data is empty: name a file, a data set, or a task that ships")
        if self.lora_rank is not None and self.optimizer != "adamw":
            problems.append(f"lora_rank trains adapters by adamw, and optimizer is {self.optimizer!r}")
        if self.task == "classification" and self.train_on_prompt:
            problems.append("train_on_prompt says something of the task language")
        if problems:
            raise ValueError("; ".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "FinetuneSettings":
        """The settings with these values, types and bounds checked.

        Raises:
            ValueError: one line that names what is unknown, of the wrong type or out of range.
        """
        if problems := others_in_place_of_numbers(values, _properties()):
            raise ValueError("; ".join(problems))
        try:
            return _adapter().validate_python(dict(values), strict=False)
        except ValidationError as error:
            problems = [_format_error(problem) for problem in error.errors()]
            raise ValueError("; ".join(problems)) from error


def setting_help() -> dict[str, str]:
    """From each setting's name to what it means."""
    return {name: " ".join(schema.get("description", "").split()) for name, schema in _properties().items()}


def text_settings() -> dict[str, bool]:
    """The settings that are text, and whether they may be null."""
    return text_fields(_properties())


def default_of(name: str) -> Any:
    """The default of a setting, None where it has none."""
    return _properties()[name].get("default")


@cache
def _adapter() -> TypeAdapter[FinetuneSettings]:
    return TypeAdapter(FinetuneSettings)


@cache
def _properties() -> dict[str, dict[str, Any]]:
    return _adapter().json_schema()["properties"]


def _format_error(problem: Any) -> str:
    where = ".".join(map(str, problem["loc"]))
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "missing":
        return f"{where} is missing"
    if problem["type"] == "unexpected_keyword_argument":
        return f"there is no setting {where!r}; there are {', '.join(setting_help())}"
    return f"{where}: {problem['msg']}, got {problem['input']!r}"
