"""Several folders of prepared data as one, drawn from by weight."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from transformers import PreTrainedTokenizerBase

from foldrank.data.config import DataConfig, SequenceFormat, SourceConfig
from foldrank.data.identity import DataIdentity, tokenizer_sha256
from foldrank.data.order import MixedDataset
from foldrank.data.prepared import PreparedData


class ConcatenatedSources(ConcatDataset[dict[str, Tensor]]):
    """Sequences to evaluate on, source after source."""

    def __init__(self, parts: Mapping[str, Dataset[dict[str, Tensor]]]) -> None:
        super().__init__(list(parts.values()))
        self.names = tuple(parts)

    def ranges(self) -> dict[str, range]:
        """From each source's name to the indices of its sequences."""
        starts = [0, *self.cumulative_sizes]
        return {name: range(*ends) for name, *ends in zip(self.names, starts, starts[1:], strict=False)}


class MixedData:
    """The folders that `data.sources` names. It gives what `PreparedData` gives.

    Raises:
        ValueError: for a folder that is none of prepared data or is damaged, and where they are not of one tokenizer.
    """

    def __init__(self, config: DataConfig) -> None:
        assert config.sources is not None
        if config.tokenizer is not None:
            raise ValueError("data.sources were prepared with a tokenizer of their own: name none (data.tokenizer)")
        self.sources: Sequence[SourceConfig] = config.sources
        self.data = {source.label: _opened(source, self.sources[0]) for source in config.sources}
        self.weights = {source.label: source.weight for source in config.sources}
        self._tokenizer = next(iter(self.data.values())).tokenizer()
        expected = tokenizer_sha256(self._tokenizer)
        for source in config.sources[1:]:
            if (found := tokenizer_sha256(self.data[source.label].tokenizer())) != expected:
                raise ValueError(
                    f"{source.source} and {config.sources[0].source} have other tokenizers (sha256 {found[:12]} and "
                    f"{expected[:12]}): prepare the one with the other's (--tokenizer {config.sources[0].source}"
                    "/tokenizer)"
                )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one of all sources."""
        return self._tokenizer

    def text_sha256(self) -> str:
        """A hash of the hashes of all sources' text, in their order."""
        return hashlib.sha256("".join(data.text_sha256() for data in self.data.values()).encode()).hexdigest()

    def identity(self) -> DataIdentity:
        """What a run that trains on this was trained on."""
        train, validation = (
            sum(data.tokens(split) for data in self.data.values()) for split in ("train", "validation")
        )
        return DataIdentity(
            kind="mixture",
            sources={name: data.text_sha256() for name, data in self.data.items()},
            text_sha256=self.text_sha256(),
            tokenizer_sha256=tokenizer_sha256(self._tokenizer),
            train_tokens=train,
            validation_tokens=validation,
        )

    def training(self, form: SequenceFormat, *, seed: int, num_sequences: int) -> MixedDataset:
        """The sequences of a training run, in their order."""
        parts = {name: data.sequences("train", form) for name, data in self.data.items()}
        return MixedDataset(parts, self.weights, seed, num_sequences)

    def validation(self, form: SequenceFormat, tokens: int | None = None) -> ConcatenatedSources:
        """The first sequences of each source's validation split, of `tokens` the share that its weight says, one
        sequence at least; None: all.
        """
        shares = self._shares(tokens)
        return ConcatenatedSources({name: data.validation(form, shares[name]) for name, data in self.data.items()})

    def test(self, form: SequenceFormat, *, validation_tokens: int, tokens: int) -> ConcatenatedSources:
        """Sequences behind those that `validation` gives for `validation_tokens`, in the same shares.

        Raises:
            ValueError: where a source has none.
        """
        skipped, taken = self._shares(validation_tokens), self._shares(tokens)
        return ConcatenatedSources(
            {
                name: data.test(form, validation_tokens=skipped[name] or 0, tokens=taken[name] or 0)
                for name, data in self.data.items()
            }
        )

    def _shares(self, tokens: int | None) -> dict[str, int | None]:
        whole = sum(self.weights.values())
        return {name: tokens and max(1, round(tokens * weight / whole)) for name, weight in self.weights.items()}


def _opened(source: SourceConfig, first: SourceConfig) -> PreparedData:
    try:
        return PreparedData(Path(source.source))
    except ValueError as error:
        if (Path(source.source) / "manifest.json").exists():
            raise
        raise ValueError(
            f"{source.source} is no prepared data, of which alone mixtures are made: foldrank prepare it first, with "
            f"the tokenizer of the others (--tokenizer {first.source}/tokenizer)"
        ) from error
