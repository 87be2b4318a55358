"""A recipe: every setting of a pre-training run in one frozen, checked value."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from foldrank.bounds import Bounds, out_of_bounds
from foldrank.core.config import STRICT, LowRankConfig
from foldrank.data.config import DataConfig
from foldrank.recipes.model_config import ModelConfig
from foldrank.recipes.patterns import check_patterns
from foldrank.recipes.train_config import TrainConfig

MAX_PROMPT = 1 << 16
"""Characters of a prompt."""

BESIDE_CONFIG = ("config", "fields", "vocab_size")
"""Settings of `model` that go together; all others are the short form."""

FORMER_NAMES = {"train.control": "ablation", "low_rank.options": "extra_config"}
"""From a setting's dotted name in foldrank 0.1 to its last part now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """All settings of a run. `low_rank` None is the dense model.

    Raises:
        ValueError: naming what is out of range, or does not go together.

    Example:
        >>> from foldrank.recipes import RECIPES
        >>> RECIPES["demo"].override({"train.steps": 10}).train.steps
        10
    """

    __pydantic_config__ = STRICT

    model: ModelConfig = field(default_factory=ModelConfig)
    low_rank: LowRankConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: Annotated[int, Bounds(0, (1 << 32) - 1)] = 0
    """Seed of the initial weights and of the order of the data."""

    sample_prompt: str = "def "
    """What the folded model is given to continue in the summary, and the model in training at each evaluation."""

    sample_tokens: Annotated[int, Bounds(1, 4096)] = 96
    """Tokens by which the folded model continues it; at an evaluation at most 32."""

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
        tree = _ADAPTER.dump_python(self, mode="json")
        if self.model.config is not None:
            tree["model"] = {name: tree["model"][name] for name in BESIDE_CONFIG}
        return tree

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Recipe":
        """The recipe with these settings, types and bounds checked.

        Raises:
            ValueError: one line that names each setting that is unknown, of the wrong type or out of range.
        """
        if problems := [*others_in_place_of_numbers(settings, _fields()), *_short_form_beside_config(settings)]:
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

        A `model.config` takes the place of all of `model`.

        Raises:
            ValueError: for a name that does not exist, and as `from_dict`.
        """
        tree = self.to_dict()
        if "model.config" in settings:
            tree["model"] = {}
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

    def resolved(node: Any) -> Any:
        """A schema with those that it names in their place."""
        if isinstance(node, list):
            return [resolved(part) for part in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return resolved(schema["$defs"][node["$ref"].rpartition("/")[2]])
        return {name: resolved(part) for name, part in node.items()}

    def below(node: Mapping[str, Any], prefix: str) -> dict[str, dict[str, Any]]:
        fields: dict[str, dict[str, Any]] = {}
        for name, setting in node["properties"].items():
            choices = [setting, *setting.get("anyOf", ())]
            parts = [schema["$defs"][choice["$ref"].rpartition("/")[2]] for choice in choices if "$ref" in choice]
            fields |= below(parts[0], f"{prefix}{name}.") if parts else {prefix + name: resolved(setting)}
        return fields

    return below(schema, "")


@cache
def field_help() -> dict[str, str]:
    """From each setting's dotted name to what it means."""
    return {name: " ".join(setting.get("description", "").split()) for name, setting in _fields().items()}


@cache
def field_defaults() -> dict[str, Any]:
    """From each setting's dotted name to its default; one that must be given is not there."""
    # Of a table that is empty by default the schema says nothing.
    known = {name: setting.get("default", {}) for name, setting in _fields().items() if setting.get("type") == "object"}
    return known | {name: setting["default"] for name, setting in _fields().items() if "default" in setting}


@cache
def text_settings() -> dict[str, bool]:
    """The settings that are text, by dotted name, and whether they may be null."""
    return text_fields(_fields())


def text_fields(schemas: Mapping[str, Mapping[str, Any]]) -> dict[str, bool]:
    """Those of JSON schemas by name that are of text, and whether it may be null."""
    return {name: "null" in _kinds(part) for name, part in schemas.items() if _kinds(part) <= {"string", "null"}}


def _kinds(setting: Mapping[str, Any]) -> set[Any]:
    """The types of JSON that a setting may have."""
    return {choice.get("type") for choice in setting.get("anyOf", [setting])}


def _types(schema: Any) -> set[str]:
    """Every type of JSON that occurs in a setting, at any depth: also of a table's values."""
    if isinstance(schema, list):
        return set().union(*map(_types, schema))
    if not isinstance(schema, dict):
        return set()
    own = {schema["type"]} if isinstance(schema.get("type"), str) else set()
    return own.union(*map(_types, schema.values()))


def others_in_place_of_numbers(settings: Mapping[str, Any], schemas: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with settings that pydantic would let pass: it takes `1_000` for a thousand, and `true` for one.

    Args:
        settings: a tree of values.
        schemas: from each setting's dotted name to its JSON schema.
    """
    problems = []
    for dotted, setting in schemas.items():
        value: Any = settings
        for name in dotted.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        types = _types(setting)
        boolean = types & {"integer", "number"} and "boolean" not in types and _holds_boolean(value)
        if boolean or (isinstance(value, str) and _kinds(setting) <= {"integer", "number", "null"}):
            problems.append(f"{dotted}: should be a number, got {value!r}")
    return problems


def _short_form_beside_config(settings: Mapping[str, Any]) -> list[str]:
    model = settings.get("model")
    if not isinstance(model, Mapping) or model.get("config") is None:
        return []
    return [
        f"model.{name} is of the short form, in whose place model.config is: replace the config's field (model.fields)"
        for name in model
        if name not in BESIDE_CONFIG and f"model.{name}" in _fields()
    ]


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
