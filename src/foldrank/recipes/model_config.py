"""The settings of a recipe's model, each with its bounds and its meaning."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from foldrank.bounds import Bounds, out_of_bounds
from foldrank.core.config import STRICT
from foldrank.recipes import architecture


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape of a Llama, or the config of any family of transformers that has low-rank classes.

    Beside a `config` the sizes are its own, to be read.

    Raises:
        ValueError: naming every field that is out of range, and for a config that cannot be read.
    """

    __pydantic_config__ = STRICT

    config: str | Mapping[str, Any] | None = None
    """Architecture in place of the settings below: a `config.json` of transformers, its folder or a name on the hub,
    the fields of which the recipe then holds; None: a Llama of these settings."""

    fields: Mapping[str, Any] | None = None
    """Fields of the config to replace, by the names that it has."""

    hidden_size: Annotated[int, Bounds(1, 1 << 17)] = 256
    """Width d of the residual stream."""

    intermediate_size: Annotated[int, Bounds(1, 1 << 19)] = 688
    """Width of the MLP."""

    num_layers: Annotated[int, Bounds(1, 1 << 9)] = 6
    """Number of blocks."""

    num_heads: Annotated[int, Bounds(1, 1 << 12)] = 4
    """Attention heads per block."""

    num_key_value_heads: Annotated[int | None, Bounds(1, 1 << 12)] = None
    """Heads of keys and values, each shared by as many query heads (grouped-query attention); None: num_heads."""

    head_dim: Annotated[int | None, Bounds(2, 1 << 12)] = None
    """Width of a head; None: hidden_size / num_heads."""

    rope_theta: Annotated[float, Bounds(1, 1e12)] = 10_000.0
    """Base of the rotary embedding's wavelengths."""

    rope_scaling: Mapping[str, int | float | str] | None = None
    """How transformers scales the rotary embedding: `rope_type`, such as llama3 or yarn, and what that type takes."""

    max_position_embeddings: Annotated[int | None, Bounds(1, 1 << 24)] = None
    """Positions that the model is made for, which others take for its window; None: the sequence length."""

    rms_norm_eps: Annotated[float, Bounds(0, 1, above=True)] = 1e-6
    """Added to the mean square in RMSNorm."""

    vocab_size: Annotated[int | None, Bounds(1, 1 << 22)] = None
    """Entries of the embedding and of the head; None: the config's, or as many as the tokenizer has."""

    tie_embeddings: bool = False
    """Share the embedding with the output head."""

    def __post_init__(self) -> None:
        if self.config is not None:
            self._take_config(self.config)
        elif self.fields is not None:
            raise ValueError("fields are of a config, and none is named")
        problems = out_of_bounds(self)
        if self.config is None and not problems:
            problems = self._problems_of_heads()
        if problems:
            raise ValueError("; ".join(problems))

    def _take_config(self, config: str | Mapping[str, Any]) -> None:
        given = architecture.read_architecture(config) if isinstance(config, str) else config
        fields = architecture.replaced(given, self.fields or {})
        form = architecture.short_form(fields)
        vocab_size = fields.pop("vocab_size", None)
        if self.vocab_size is not None:
            vocab_size = self.vocab_size
        elif vocab_size is not None and type(vocab_size) is not int:
            raise ValueError(f"config: vocab_size must be a whole number, got {vocab_size!r}")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, value in form.items():
            # `replace` gives what was read before, a constructor the defaults.
            if getattr(self, name) not in (value, defaults[name]):
                raise ValueError(f"{name} {getattr(self, name)} is not the config's, {value}: replace it in fields")
        for name, value in {**form, "config": fields, "fields": None, "vocab_size": vocab_size}.items():
            object.__setattr__(self, name, value)

    def _problems_of_heads(self) -> list[str]:
        problems = []
        if self.head_dim is not None and self.head_dim % 2:
            problems.append(f"head_dim must be even (rotary embedding), got {self.head_dim}")
        if self.num_heads % (self.num_key_value_heads or self.num_heads):
            problems.append(
                f"num_heads {self.num_heads} must be a multiple of num_key_value_heads {self.num_key_value_heads}"
            )
        elif self.head_dim is None and self.hidden_size % (2 * self.num_heads):
            problems.append(
                f"hidden_size {self.hidden_size} must be a multiple of twice num_heads {self.num_heads}: a head has an "
                "even width (rotary embedding)"
            )
        return problems

    def with_layers(self, count: int) -> "ModelConfig":
        """The same with so many blocks."""
        if self.config is None:
            return replace(self, num_layers=count)
        assert not isinstance(self.config, str)
        return ModelConfig(config=architecture.with_layers(self.config, count), vocab_size=self.vocab_size)

    @property
    def query_width(self) -> int:
        """Numbers of all query heads together, and of the attention's output."""
        return self.num_heads * (self.head_dim or self.hidden_size // self.num_heads)

    @property
    def key_value_width(self) -> int:
        """Numbers of all heads of keys, and of all heads of values."""
        return self.query_width // self.num_heads * (self.num_key_value_heads or self.num_heads)
