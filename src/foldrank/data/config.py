"""Settings of a corpus and its tokenizer, without any heavy import."""

from dataclasses import dataclass

from foldrank.config import STRICT


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which text, which tokenizer, and how much of it is held out.

    Raises:
        ValueError: naming every field that is out of range.
    """

    __pydantic_config__ = STRICT

    source: str = "stdlib"
    """`stdlib`: the sources of the running Python's standard library; or a text file, or a folder of text files."""

    tokenizer: str | None = None
    """A Hugging Face tokenizer by name or folder; None: byte-level BPE trained on this text."""

    vocab_size: int = 4096
    """Entries of the tokenizer trained here."""

    validation_fraction: float = 0.04
    """Share of the documents held out, chosen by a hash of their content."""

    def __post_init__(self) -> None:
        problems = []
        if self.vocab_size < 257:
            problems.append(f"vocab_size must be at least 257, got {self.vocab_size}")
        if not 0 < self.validation_fraction < 1:
            problems.append(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}")
        if problems:
            raise ValueError("DataConfig: " + "; ".join(problems))
