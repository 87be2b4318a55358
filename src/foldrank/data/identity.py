"""What a run was trained on: enough to open exactly that again, or to say that it is gone."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True, slots=True)
class DataIdentity:
    """The text and the tokenizer of a run.

    Raises:
        ValueError: naming the fields that are no text, or no number, where they must be.
    """

    kind: Literal["prepared", "stream", "mixture"]
    """Tokenized before the training, or while it goes on; or several sources of the first kind."""

    tokenizer_sha256: str
    """Of what the tokenizer computes (`tokenizer_sha256`); the copy in a checkpoint has the same."""

    text_sha256: str | None = None
    """Of all text in its order, of a mixture of its sources' hashes; None of a stream, which nobody has read to its
    end."""

    folder: str | None = None
    """Absolute path of the prepared data; None of a stream and of a mixture."""

    train_tokens: int | None = None
    """Tokens of the training split, an end token for each document included; None of a stream."""

    validation_tokens: int | None = None
    """Tokens of the validation split, counted alike."""

    source: str | None = None
    """Where a stream reads, with its revision behind "@" where one was named."""

    subset: str | None = None
    """Configuration of the data set that a stream reads."""

    split: str | None = None
    """Split that a stream reads."""

    first_documents_sha256: str | None = None
    """Of the first documents of a stream."""

    sources: Mapping[str, str] | None = None
    """Of a mixture, from each source's name to the hash of its text."""

    def __post_init__(self) -> None:
        problems = [
            f"{field.name} is {value!r}"
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None and not _is_of_its_type(field.name, value)
        ]
        if self.kind not in ("prepared", "stream", "mixture"):
            problems.append(f"kind is {self.kind!r}")
        if not isinstance(self.tokenizer_sha256, str):
            problems.append(f"tokenizer_sha256 is {self.tokenizer_sha256!r}")
        if problems:
            raise ValueError("DataIdentity: " + "; ".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; `from_dict` is the way back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DataIdentity":
        """The identity with these values.

        Raises:
            ValueError: for values that no `to_dict` gave.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"DataIdentity: {error}") from error

    def check(self, found: "DataIdentity") -> None:
        """Refuses data that is not this.

        Raises:
            ValueError: naming both hashes.
        """
        for source, then in (self.sources or {}).items():
            if (now := (found.sources or {}).get(source)) != then:
                raise ValueError(
                    f"the text of the source {source} has changed since the run was trained: its sha256 was "
                    f"{then[:12]} and is {str(now)[:12]}; restore it, or start a new run"
                )
        for what, name in (("text", "text_sha256"), ("tokenizer", "tokenizer_sha256"), ("text", FIRST)):
            then, now = getattr(self, name), getattr(found, name)
            if then is not None and then != now:
                raise ValueError(
                    f"the {what} has changed since the run was trained: its sha256 was {then[:12]} and is "
                    f"{str(now)[:12]}; restore it, or start a new run"
                )


FIRST = "first_documents_sha256"


def _is_of_its_type(field: str, value: Any) -> bool:
    if field == "sources":
        return isinstance(value, Mapping) and all(isinstance(part, str) for pair in value.items() for part in pair)
    return isinstance(value, int if field.endswith("_tokens") else str)


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what a tokenizer computes, equal for the same tokenizer wherever it is saved and loaded."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    parts: list[Any] = [sorted(tokenizer.get_vocab().items()), special]
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        parts += [state["model"].get("merges"), state["normalizer"], state["pre_tokenizer"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
