"""A recipe: every setting of a pre-training run in one frozen, checked value."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import TypeAdapter, ValidationError

from foldrank.bounds import Bounds, out_of_bounds
from foldrank.core.config import STRICT, LowRankConfig
from foldrank.data.config import DataConfig, Layout
from foldrank.recipes.patterns import check_patterns

Checkpointing = Literal["block", "latents"]
"""What activation checkpointing keeps of a block: its input, or its input and latents (activation_checkpointing.py)."""

Ablation = Literal["folded", "scaled", "random", "orthogonal"]
"""Starts that stand in for the residual, see train/ablations.py."""

MAX_PROMPT = 1 << 16
"""Characters of a prompt."""

FORMER_NAMES = {"train.control": "ablation", "low_rank.options": "extra_config"}
"""From a setting's dotted name in foldrank 0.1 to its last part now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape of a Llama.

    Raises:
        ValueError: naming every field that is out of range.
    """

    __pydantic_config__ = STRICT

    hidden_size: Annotated[int, Bounds(1, 1 << 17)] = 256
    """Width d of the residual stream."""

    intermediate_size: Annotated[int, Bounds(1, 1 << 19)] = 688
    """Width of the MLP."""

    num_layers: Annotated[int, Bounds(1, 1 << 9)] = 6
    """Number of blocks."""

    num_heads: Annotated[int, Bounds(1, 1 << 12)] = 4
    """Attention heads per block."""

    vocab_size: Annotated[int | None, Bounds(1, 1 << 22)] = None
    """Entries of the embedding and of the head; None: as many as the tokenizer has."""

    tie_embeddings: bool = False
    """Share the embedding with the output head."""

    def __post_init__(self) -> None:
        problems = out_of_bounds(self)
        if not problems and self.hidden_size % (2 * self.num_heads):
            problems.append(
                f"hidden_size {self.hidden_size} must be a multiple of twice num_heads {self.num_heads}: a head has an "
                "even width (rotary embedding)"
            )
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Optimization: AdamW, linear warm-up, cosine decay.

    Raises:
        ValueError: naming every field that is out of range.
    """

    __pydantic_config__ = STRICT

    steps: Annotated[int, Bounds(1, 10**9)] = 300
    """Optimizer steps."""

    batch_size: Annotated[int, Bounds(1, 1 << 20)] = 16
    """Sequences per optimizer step, over all processes and accumulation steps."""

    micro_batch_size: Annotated[int | None, Bounds(1, 1 << 20)] = None
    """Sequences per forward pass and process, at most; None: as many as a step needs."""

    activation_checkpointing: Checkpointing | None = None
    """What each block keeps for the backward pass, which computes the rest again: block, its input alone: least memory,
    most time; latents, its input and the latents of its low-rank layers; None: everything."""

    chunked_loss: bool = False
    """Compute head and loss by chunks of tokens (fused linear cross-entropy): the same loss, without the logits of a
    whole batch in memory, the largest thing there where the vocabulary is large and the model small."""

    sequence_length: Annotated[int, Bounds(2, 1 << 20)] = 256
    """Tokens per sequence."""

    layout: Layout = "packed"
    """packed: documents joined and cut into sequences; padded: each document cut or padded to one, as in the published
    protocol."""

    learning_rate: Annotated[float, Bounds(0, 100, above=True)] = 0.006
    """Peak learning rate."""

    min_learning_rate_ratio: float = 0.1
    """Last learning rate over the peak."""

    warmup_ratio: float = 0.1
    """Share of the steps that is linear warm-up."""

    weight_decay: Annotated[float, Bounds(0, 100)] = 0.01
    """AdamW's decoupled decay, on matrices alone."""

    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's running averages."""

    max_grad_norm: Annotated[float, Bounds(0, 10**6, above=True)] = 0.5
    """Gradients are clipped to this norm."""

    fold_at_start: bool = False
    """Fold before the first step and let the weight decay pull towards the residual instead of 0: the same training by
    the graph of plain low rank, each checkpoint of which can be deployed as it is."""

    ablation: Ablation | None = None
    """An ablation, for studies: take the residual away and start each up-projection with the norm that it
    would give: folded, scaled, random or orthogonal (train/ablations.py)."""

    eval_every: Annotated[int, Bounds(1, 10**9)] = 75
    """Steps between evaluations."""

    save_every: Annotated[int, Bounds(1, 10**9)] = 100
    """Steps between checkpoints from which an interrupted run goes on."""

    keep_checkpoints: Annotated[int, Bounds(1, 10**6)] = 2
    """How many of the newest checkpoints stay."""

    log_every: Annotated[int, Bounds(1, 10**9)] = 1
    """Steps between log entries."""

    report_to: Sequence[str] = ()
    """Further logs, through Trainer's own integrations: tensorboard, trackio, wandb."""

    loader_workers: Annotated[int, Bounds(0, 256)] = 0
    """Processes that read the data; 0: the training process itself."""

    eval_tokens: Annotated[int | None, Bounds(1, 10**15)] = None
    """Validation tokens per evaluation; None: the whole split."""

    test_tokens: Annotated[int | None, Bounds(1, 10**15)] = None
    """Held-out tokens behind those of `eval_tokens`, on which the folded model is measured once, at the end; None: no
    such test."""

    dtype: str = "float32"
    """float32, or bfloat16 for autocast over float32 weights."""

    device: str = "auto"
    """cpu, or auto: an accelerator where there is one."""

    def __post_init__(self) -> None:
        problems = out_of_bounds(self)
        if self.test_tokens is not None and self.eval_tokens is None:
            problems.append("test_tokens needs eval_tokens: without, the validation takes all that is held out")
        if self.ablation is not None and self.fold_at_start:
            problems.append("ablation and fold_at_start both take the residual away: give one of them")
        if not 0 <= self.warmup_ratio < 1:
            problems.append(f"warmup_ratio must lie in [0, 1), got {self.warmup_ratio}")
        if self.dtype not in ("float32", "bfloat16"):
            problems.append(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        if self.device not in ("auto", "cpu"):
            problems.append(f"device must be auto or cpu, got {self.device!r}")
        if not 0 <= self.min_learning_rate_ratio <= 1:
            problems.append(f"min_learning_rate_ratio must lie in [0, 1], got {self.min_learning_rate_ratio}")
        if not all(0 <= beta < 1 for beta in self.betas):
            problems.append(f"betas must lie in [0, 1), got {self.betas}")
        if problems:
            raise ValueError("; ".join(problems))

    def resolve_micro_batch_size(self, processes: int = 1) -> int:
        """Sequences that each of `processes` takes in one forward pass: the most that `micro_batch_size` allows.

        Raises:
            ValueError: where a step's sequences cannot be shared out evenly.
        """
        if processes < 1 or self.batch_size % processes:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be shared out evenly among {processes} processes: take a number "
                "that divides it, or another batch_size"
            )
        batch = self.batch_size // processes
        limit = min(self.micro_batch_size or batch, batch)
        return next(count for count in range(limit, 0, -1) if batch % count == 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """All settings of a run. `low_rank` None is the dense model.

    Raises:
        ValueError: naming what is out of range, or does not go together.
    """

    __pydantic_config__ = STRICT

    model: ModelConfig = field(default_factory=ModelConfig)
    low_rank: LowRankConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: Annotated[int, Bounds(0, (1 << 32) - 1)] = 0
    """Seed of the initial weights and of the order of the data."""

    sample_prompt: str = "def "
    """What the folded model is given to continue in the summary."""

    def __post_init__(self) -> None:
        problems = out_of_bounds(self)
        if self.data.stream and self.train.loader_workers > 1:
            problems.append(
                f"a stream is read by one loader worker at most, got loader_workers {self.train.loader_workers}"
            )
        if len(self.sample_prompt) > MAX_PROMPT:
            problems.append(
                f"sample_prompt must have at most {MAX_PROMPT:,} characters, got {len(self.sample_prompt):,}"
            )
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def nominal_vocab_size(self) -> int:
        """Entries of the embedding, as far as the recipe tells before a tokenizer is read."""
        return self.model.vocab_size or self.data.vocab_entries

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values; `Recipe.from_dict` is the way back."""
        return _ADAPTER.dump_python(self, mode="json")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Recipe":
        """The recipe with these settings, types and bounds checked.

        Raises:
            ValueError: one line that names each setting that is unknown, of the wrong type or out of range.
        """
        if problems := _others_in_place_of_numbers(settings):
            raise ValueError("; ".join(problems))
        try:
            recipe = _ADAPTER.validate_python(_with_tuples(_with_new_names(settings)))
            if recipe.low_rank is not None:
                check_patterns(recipe.low_rank, recipe.model.num_layers)
            return recipe
        except ValidationError as error:
            raise ValueError("; ".join(_format_error(problem) for problem in error.errors())) from error

    def override(self, settings: Mapping[str, Any]) -> "Recipe":
        """This recipe with settings replaced by dotted name, such as `{"train.steps": 100}`.

        Raises:
            ValueError: for a name that does not exist, and as `from_dict`.
        """
        tree = self.to_dict()
        for dotted, value in settings.items():
            *path, last = dotted.split(".")
            subtree = tree
            for step in path:
                if not isinstance(subtree.get(step), dict):
                    subtree[step] = {}
                subtree = subtree[step]
            subtree[last] = value
        return Recipe.from_dict(tree)


_ADAPTER = TypeAdapter(Recipe)


@cache
def _fields() -> dict[str, dict[str, Any]]:
    """From each setting's dotted name to its JSON schema."""
    schema = _ADAPTER.json_schema()

    def below(node: Mapping[str, Any], prefix: str) -> dict[str, dict[str, Any]]:
        fields: dict[str, dict[str, Any]] = {}
        for name, setting in node["properties"].items():
            choices = [setting, *setting.get("anyOf", ())]
            parts = [schema["$defs"][choice["$ref"].rpartition("/")[2]] for choice in choices if "$ref" in choice]
            fields |= below(parts[0], f"{prefix}{name}.") if parts else {prefix + name: setting}
        return fields

    return below(schema, "")


@cache
def field_help() -> dict[str, str]:
    """From each setting's dotted name to what it means."""
    return {name: " ".join(setting.get("description", "").split()) for name, setting in _fields().items()}


@cache
def text_settings() -> dict[str, bool]:
    """The settings that are text, by dotted name, and whether they may be null."""
    return {name: "null" in _kinds(part) for name, part in _fields().items() if _kinds(part) <= {"string", "null"}}


def _kinds(setting: Mapping[str, Any]) -> set[str | None]:
    """The types of JSON that a setting may have."""
    return {choice.get("type") for choice in setting.get("anyOf", [setting])}


def _others_in_place_of_numbers(settings: Mapping[str, Any]) -> list[str]:
    """Pydantic would take `1_000` for a thousand, and `true` for one."""
    problems = []
    for dotted, setting in _fields().items():
        value: Any = settings
        for name in dotted.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        boolean = re.search("integer|number", str(setting)) and "boolean" not in str(setting) and _holds_boolean(value)
        if boolean or (isinstance(value, str) and _kinds(setting) <= {"integer", "number", "null"}):
            problems.append(f"{dotted}: should be a number, got {value!r}")
    return problems


def _holds_boolean(value: Any) -> bool:
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, bool) or any(map(_holds_boolean, parts))


def _with_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that foldrank 0.1 saved, under their names of today."""
    renamed = dict(settings)
    for dotted, name in FORMER_NAMES.items():
        part, _, former = dotted.partition(".")
        if isinstance(fields := renamed.get(part), Mapping) and former in fields:
            renamed[part] = {name if key == former else key: value for key, value in fields.items()}
    return renamed


def _with_tuples(value: Any) -> Any:
    # JSON and YAML know no tuples: with them back, equal recipes compare equal.
    if isinstance(value, Mapping):
        return {name: _with_tuples(entry) for name, entry in value.items()}
    return tuple(_with_tuples(entry) for entry in value) if isinstance(value, list) else value


def _format_error(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "unexpected_keyword_argument":
        near = difflib.get_close_matches(where, field_help(), n=3, cutoff=0)
        return f"the recipe has no setting {where!r}; the nearest are {', '.join(near)}"
    if problem["type"] == "value_error":
        return f"{where}: {problem['ctx']['error']}" if where else str(problem["ctx"]["error"])
    return f"{where}: {problem['msg']}, got {problem['input']!r}"
