"""What to make low-rank, and how: frozen settings without torch, saved as JSON or YAML beside the model.

Patterns name modules. A pattern matches a module when it is the module's dotted name, a tail of it at a dot
("q_proj", "mlp.up_proj"), or a regular expression that matches the whole of it.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard, TypeVar

Expansion = Literal["contiguous", "random", "balanced"]
Signs = Literal["none", "alternating", "random"]
Init = Literal["cola", "orthogonal", "zero_writers"]
FactorStart = Literal["cola", "orthogonal", "zero"]
Activation = Literal["silu", "gelu", "relu", "tanh"]
Scale = float | Literal["trainable"]

STRICT = {"extra": "forbid", "use_attribute_docstrings": True}
"""How pydantic checks these classes where a recipe is read: no unknown fields. The core does without pydantic."""

EXPANSIONS: tuple[Expansion, ...] = ("contiguous", "random", "balanced")
INITS: tuple[Init, ...] = ("cola", "orthogonal", "zero_writers")
SIGNS: tuple[Signs, ...] = ("none", "alternating", "random")
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "relu", "tanh")
SCOPES: Mapping[str, str] = {
    "all": r".*",
    "attention": r"(.*\.)?\w*(attn|attention)\w*\..*",
    "mlp": r"(.*\.)?\w*(mlp|ffn|feed_forward)\w*\..*",
    "reading": r"(.*\.)?(q|k|v|qkv|query|key|value|query_key_value|gate|up|gate_up|fc1|c_attn|c_fc|w1|w3)(_proj)?",
    "writing": r"(.*\.)?(o|out|down|fc2|dense|c|w2|wo)(_proj)?",
}
"""What the named scopes mean, as regular expressions on module names."""

LARGEST = 10_000
"""Of alpha and scale, in size: a slip of the keyboard beyond."""

FORMER_NAMES = {"options": "extra_config"}
"""From the name of a field in a config saved by foldrank 0.1 to its name now."""

Value = TypeVar("Value")


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` names the module called `name` (see the top of this file)."""
    return name == pattern or name.endswith("." + pattern) or re.fullmatch(pattern, name) is not None


def is_name(pattern: str) -> bool:
    """Whether `pattern` can be nothing but a module's dotted name, or a tail of one."""
    return all(part.isidentifier() or part.isdecimal() for part in pattern.split("."))


def lookup(value: Value | Mapping[str, Value], name: str) -> Value | None:
    """`value` itself, or from a table by pattern the first entry that matches `name`; None where none does."""
    if not isinstance(value, Mapping):
        return value
    if name in value:
        return value[name]
    return next((entry for pattern, entry in value.items() if matches(pattern, name)), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResidualConfig:
    """The Duplicated Latent Residual: `y = B z + alpha / sqrt(K) * Expand_K(z)` (arXiv 2606.28932).

    Raises:
        ValueError: naming every field that is out of range.

    Example:
        >>> ResidualConfig(alpha=1.0).alpha
        1.0
    """

    __pydantic_config__ = STRICT

    alpha: float | Mapping[str, float] = 1.0
    """Strength of the residual, paper symbol alpha; where it is trainable, its start. A number, or a table from pattern
    to number (layers that it does not name get no residual)."""

    trainable: bool = False
    """Learn alpha, one scalar per layer."""

    variance_correction: bool = True
    """Divide alpha by sqrt(K), K = ceil(out_features / rank), so that the residual keeps the latent's scale."""

    expansion: Expansion = "contiguous"
    """Which latent each output repeats: `contiguous` o // K (the paper's), `random` drawn once from `seed` and the
    module's name, `balanced` floor(o * rank / out_features), which uses every latent."""

    scope: str | Sequence[str] = "all"
    """Which of the low-rank layers get a residual: all, attention, mlp, reading (from the residual stream: q, k, v,
    gate, up), writing (into it: o, down), or a list of patterns."""

    signs: Signs = "none"
    """Signs of the residual by output: none; alternating; random, drawn once from `seed` and the module's name. SiLU
    makes latents positive on average, which copies write into the direction of all ones; signs take that out."""

    seed: int = 0
    """Seed of the `random` expansion and of random signs."""

    def __post_init__(self) -> None:
        problems = []
        alphas = self.alpha if isinstance(self.alpha, Mapping) else {"": self.alpha}
        problems += [
            f"alpha must be a finite number, got {alpha!r} (at most {LARGEST:,} in size)"
            for alpha in alphas.values()
            if not (_is_real(alpha) and abs(alpha) <= LARGEST)
        ]
        if isinstance(self.alpha, Mapping):
            problems += _pattern_problems("alpha", self.alpha)
        if self.expansion not in EXPANSIONS:
            problems.append(f"expansion must be one of {', '.join(EXPANSIONS)}, got {self.expansion!r}")
        if self.signs not in SIGNS:
            problems.append(f"signs must be one of {', '.join(SIGNS)}, got {self.signs!r}")
        if isinstance(self.scope, str) and self.scope not in SCOPES:
            problems.append(f"scope must be one of {', '.join(SCOPES)} or a list of patterns, got {self.scope!r}")
        if not isinstance(self.scope, str):
            problems += _pattern_problems("scope", self.scope)
        _refuse(type(self).__name__, problems)

    @property
    def scope_patterns(self) -> tuple[str, ...]:
        """The patterns that `scope` stands for."""
        return (SCOPES[self.scope],) if isinstance(self.scope, str) else tuple(self.scope)

    def for_layer(self, name: str) -> "ResidualConfig | None":
        """The residual of the layer called `name`, alpha a number and scope all; None where it gets none."""
        alpha = lookup(self.alpha, name)
        if alpha is None or not any(matches(pattern, name) for pattern in self.scope_patterns):
            return None
        return dataclasses.replace(self, alpha=alpha, scope="all")


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRankConfig:
    """Which linear layers become `y = B z`, `z = s act(A x)`, of which rank, on which backbone, with which residual.

    Raises:
        ValueError: naming every field that is out of range.

    Example:
        >>> LowRankConfig(rank=8, activation="silu", residual=ResidualConfig(alpha=0.5)).residual.alpha
        0.5
    """

    __pydantic_config__ = STRICT

    rank: int | float | Mapping[str, int | float] | None = None
    """Rank r of the factors: a number, a fraction of the smaller side of the layer (a float in (0, 1)), or a table
    from pattern to either, in which an exact name comes first, then the first match. None: `budget` decides."""

    budget: float | None = None
    """In place of `rank`: the share of the whole model's parameters (embeddings, head and layers that stay dense
    included, shared ones once) that is left once it is low-rank and folded, in (0, 1). Every converted layer gets one
    common fraction of its full rank (`surgery/ranks.py`); the total is never above the budget, and below it by less
    than one rank of one layer."""

    activation: Activation | None = None
    """Function between the factors: `silu` is CoLA, None is plain low rank."""

    scale: Scale | None = None
    """Low-rank scale s in `z = s act(A x)`: a number (`low_rank_alpha / rank` of published code), or "trainable":
    s = tanh(theta), theta learned per layer from 1. None: s = 1. The fold multiplies it into B."""

    backbone: str = "lowrank"
    """The kind of layer, by its name in `foldrank.surgery.backbones`: `lowrank` is y = B z, plain or CoLA; `sltrain` is
    SLTrain's y = B z + S x, S sparse with a fixed random support."""

    extra_config: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    """Settings of the backbone's own. `sltrain`: `density` of S (0.03) and `seed` of its support (0)."""

    init: Init = "cola"
    """How the factors start: `cola`, normal; `orthogonal`, semi-orthogonal with the same Frobenius norms;
    `zero_writers`, as `cola`, but layers that write into the residual stream (`ResidualConfig.scope` writing) give 0: B
    is 0 there, and they have no residual. Only a start: a saved model does not tell it."""

    targets: Sequence[str] | None = None
    """Patterns of the layers to convert; None: those that the rank table names, or each linear layer but the output
    head where rank is no table."""

    exclude: Sequence[str] = ()
    """Patterns of layers that stay dense although `targets` names them."""

    dense_first: int = 0
    """Number of blocks at the start that stay dense. Blocks are the entries that hold targeted layers, of the
    `nn.ModuleList` that holds most of them."""

    dense_last: int = 0
    """Number of blocks at the end that stay dense."""

    residual: ResidualConfig | None = None
    """The residual added while training; None: none."""

    def __post_init__(self) -> None:
        problems = []
        ranks: dict[str, object] = {}
        if self.rank is None and self.budget is None:
            problems.append("rank is missing: give a rank, or a budget")
        elif self.rank is not None and self.budget is not None:
            problems.append(
                f"rank {self.rank!r} and budget {self.budget!r} exclude each other: set one of them to None"
            )
        if self.init not in INITS:
            problems.append(f"init must be one of {', '.join(INITS)}, got {self.init!r}")
        elif self.init != "cola" and self.backbone == "sltrain":
            problems.append(f"init {self.init} is not for sltrain, whose B starts at 0")
        if self.budget is not None and not (_is_real(self.budget) and 0 < self.budget < 1):
            problems.append(f"budget must be a share of the parameters between 0 and 1, got {self.budget!r}")
        if isinstance(self.rank, Mapping):
            if not self.rank:
                problems.append("rank is an empty table: give a number, a fraction or at least one pattern")
            problems += _pattern_problems("rank", self.rank)
            ranks = {f"rank of {pattern!r}": rank for pattern, rank in self.rank.items()}
        elif self.rank is not None:
            ranks = {"rank": self.rank}
        for what, rank in ranks.items():
            if not _is_real(rank):
                problems.append(f"{what} must be a number, got {rank!r}")
            elif isinstance(rank, int) and rank < 1:
                problems.append(f"{what} must be at least 1, got {rank}")
            elif isinstance(rank, float) and not 0 < rank < 1:
                problems.append(f"{what} as a fraction must lie between 0 and 1, got {rank} (a rank is an integer)")
        if self.activation is not None and self.activation not in ACTIVATIONS:
            problems.append(f"activation must be None or one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        is_number = _is_real(self.scale) and 0 < abs(self.scale) <= LARGEST
        if self.scale not in (None, "trainable") and not is_number:
            most = f"(at most {LARGEST:,} in size)"
            problems.append(
                f"scale must be None, 'trainable' or a finite number other than 0, got {self.scale!r} {most}"
            )
        if not isinstance(self.backbone, str):
            problems.append(f"backbone must be a name, got {self.backbone!r}")
        if not isinstance(self.residual, ResidualConfig | None):
            problems.append(f"residual must hold settings by name, got {self.residual!r}")
        if isinstance(self.extra_config, Mapping):
            problems += [
                f"extra_config: {name!r} must be a number, a truth value or a text, got {value!r}"
                for name, value in self.extra_config.items()
                if not isinstance(value, bool | int | float | str)
            ]
        else:
            problems.append(f"extra_config must be a table from name to value, got {self.extra_config!r}")
        problems += _pattern_problems("targets", self.targets or ()) + _pattern_problems("exclude", self.exclude)
        if self.targets is not None and not self.targets:
            problems.append("targets is empty: name the layers to convert, or None for every linear layer")
        problems += [
            f"{field} must be a number of blocks, 0 or more, got {count!r}"
            for field, count in (("dense_first", self.dense_first), ("dense_last", self.dense_last))
            if not isinstance(count, int) or isinstance(count, bool) or count < 0
        ]
        _refuse(type(self).__name__, problems)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; `from_dict` is the way back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LowRankConfig":
        """The config that `to_dict` wrote.

        Raises:
            ValueError: for a field that does not exist, is missing, or is out of range.
        """
        fields = dict(_known(cls, {FORMER_NAMES.get(name, name): value for name, value in fields.items()}))
        if isinstance(residual := fields.get("residual"), Mapping):
            fields["residual"] = ResidualConfig(**_known(ResidualConfig, residual))
        return cls(**fields)


def _is_real(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _pattern_problems(field: str, patterns: object) -> list[str]:
    if isinstance(patterns, str) or not isinstance(patterns, Sequence | Mapping):
        return [f"{field} must be a list of patterns, got {patterns!r}"]
    problems = []
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            problems.append(f"{field}: {pattern!r} is no name and no regular expression ({error})")
    return problems


def _known(cls: type, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    names = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(set(fields) - set(names)):
        raise ValueError(f"{cls.__name__}: unknown field {', '.join(unknown)}; the fields are {', '.join(names)}")
    # JSON and YAML know no tuples: with them back, the defaults compare equal.
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _refuse(what: str, problems: Sequence[str]) -> None:
    if problems:
        raise ValueError(f"{what}: " + "; ".join(problems))
