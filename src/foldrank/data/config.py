"""Settings of a corpus and its tokenizer, without any heavy import."""

from collections import Counter
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Literal, get_args

from foldrank.bounds import Bounds, out_of_bounds
from foldrank.core.config import STRICT

Layout = Literal["packed", "best-fit", "padded"]
"""How documents become sequences of one length: joined by end tokens and cut into blocks; whole, as many to a sequence
as fit; or each cut or padded."""

Split = Literal["train", "validation"]

TokenFormat = Literal["megatron", "uint16", "uint32", "input_ids"]
"""Token ids that exist already, see token_files.py."""

ExportFormat = Literal["megatron", "raw", "input_ids"]
"""What prepared tokens are written as for others, see token_export.py."""

EXPORT_FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)

LEAST_ENTRIES = 262
"""Of a tokenizer that is trained here: 256 bytes, and special tokens."""

MULTIPLE = 64
"""Of which the entries of a vocabulary are a multiple, so that products with embedding and head fill a GPU's tiles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceFormat:
    """What documents become."""

    length: int
    """Positions a sequence."""
    layout: Layout = "packed"
    document_mask: bool = False
    """Whether the documents of a sequence are kept apart: positions begin anew at each, from which transformers makes
    a mask across which nothing attends, and no document is predicted from the one before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One source of a mixture.

    Raises:
        ValueError: naming every field that is out of range.
    """

    __pydantic_config__ = STRICT

    source: str
    """A folder that `foldrank prepare` wrote."""

    weight: Annotated[float, Bounds(0, 1e12, above=True)]
    """Share of the sequences that are drawn from it, over the sum of all weights."""

    name: str | None = None
    """What log and metrics call it; None: the name of the folder."""

    def __post_init__(self) -> None:
        if problems := out_of_bounds(self):
            raise ValueError("; ".join(problems))

    @property
    def label(self) -> str:
        """Its name."""
        return self.name or PurePath(self.source).name


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which text, which tokenizer, and how much of it is held out (docs/data.md).

    Raises:
        ValueError: naming every field that is out of range.
    """

    __pydantic_config__ = STRICT

    source: str = "stdlib"
    """`stdlib` or `site-packages`: the sources that come with the running Python and with its installed packages
    (`site-packages-prose`: of these the prose alone); a file or folder of text, .jsonl or .parquet; a Hugging Face data
    set such as `allenai/c4`, or a local folder of one; or a folder that `foldrank prepare` wrote."""

    sources: tuple[SourceConfig, ...] | None = None
    """A mixture, in place of `source`: a list of prepared folders of one tokenizer, each with its weight, such as
    `[{source: data/code, weight: 0.3}, {source: data/prose, weight: 0.7}]`."""

    subset: str | None = None
    """Configuration of a Hugging Face data set, such as `en`."""

    split: str | None = None
    """Split of a Hugging Face data set that is read; None: `train`."""

    validation_split: str | None = None
    """Split of a Hugging Face data set that is held out; training documents that occur in it are left out. None: a
    share of the documents is held out."""

    text_field: str = "text"
    """Field of the text in .jsonl, .parquet and data sets."""

    max_documents: Annotated[int | None, Bounds(1, 10**12)] = None
    """Documents read at most; None: all."""

    tokenizer: str | None = None
    """A Hugging Face tokenizer by name or folder; None: byte-level BPE trained on this text."""

    vocab_size: Annotated[int, Bounds(1, 1 << 20)] = 4096
    """Entries of the tokenizer trained here; reserved ones fill it up to a multiple of 64. With token ids and no
    tokenizer: how many ids there are."""

    token_format: TokenFormat | None = None
    """The source holds token ids, of `tokenizer` or of an unknown one: megatron (.bin with .idx), uint16 or uint32 (raw
    .bin, as in nanoGPT), or input_ids (that column of a data set or of .parquet files); None: text."""

    end_token: Annotated[int | None, Bounds(0, 1 << 20)] = None
    """With token ids and no tokenizer: the id that ends a document."""

    validation_fraction: float = 0.04
    """Share of the documents held out, chosen by a hash of their content."""

    stream: bool = False
    """Tokenize while training instead of before it: second best, docs/data.md says why."""

    @property
    def vocab_entries(self) -> int:
        """Entries that the tokenizer trained here has."""
        return -(-self.vocab_size // MULTIPLE) * MULTIPLE

    def __post_init__(self) -> None:
        problems = out_of_bounds(self)
        if not 0 < self.validation_fraction < 1:
            problems.append(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}")
        if self.validation_split is not None and self.validation_split == (self.split or "train"):
            problems.append(f"split and validation_split are both {self.validation_split!r}: nothing would be held out")
        if self.stream and self.tokenizer is None and self.token_format is None:
            problems.append("a stream needs a tokenizer by name or folder, because none can be trained on unread text")
        if self.token_format is None and self.vocab_size < LEAST_ENTRIES:
            problems.append(f"vocab_size must be at least {LEAST_ENTRIES}, got {self.vocab_size}")
        if self.token_format is not None:
            problems += self._problems_of_token_ids()
        elif self.end_token is not None:
            problems.append("end_token says something of token ids: name their token_format")
        if self.sources is not None:
            problems += self._problems_of_sources(self.sources)
        if problems:
            raise ValueError("DataConfig: " + "; ".join(problems))

    def _problems_of_token_ids(self) -> list[str]:
        problems = ["token ids are not streamed: leave out stream"] if self.stream else []
        if (self.tokenizer is None) == (self.end_token is None):
            problems.append("token ids need the tokenizer that they are of, or their vocab_size and end_token")
        elif self.end_token is not None and self.end_token >= self.vocab_size:
            problems.append(f"end_token must be below vocab_size {self.vocab_size}, got {self.end_token}")
        return problems

    def _problems_of_sources(self, sources: tuple[SourceConfig, ...]) -> list[str]:
        problems = [] if sources else ["sources is empty: name at least one, or leave it out"]
        if self.token_format is not None:
            problems.append("sources are prepared data, of which token_format says nothing: leave it out")
        if self.stream:
            problems.append("sources are prepared data, of which nothing is left to stream: leave out stream")
        counts = Counter(source.label for source in sources)
        if twice := [name for name, count in counts.items() if count > 1]:
            problems.append(f"{counts[twice[0]]} sources are called {twice[0]!r}: give each a name")
        return problems
