"""A folder of prepared data, read: memory-mapped tokens, their tokenizer, their checksums."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from foldrank.data.config import SequenceFormat, Split
from foldrank.data.identity import DataIdentity, tokenizer_sha256
from foldrank.data.manifest import MANIFEST, Manifest, Shard
from foldrank.data.order import ShuffledDataset
from foldrank.data.sequences import SequenceDataset, sequences_of
from foldrank.data.shards import DOCUMENT_OFFSETS
from foldrank.hf.tokenizers import load_tokenizer
from foldrank.provenance import sha256_of_file


class PreparedData:
    """A folder that `prepare` wrote. One folder serves every layout and sequence length.

    Raises:
        ValueError: for a folder that is none, or whose files have not the size that its manifest says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"{folder} holds no prepared data: it has no {MANIFEST}")
        self.manifest = Manifest.read(folder)
        self.dtype = np.dtype(self.manifest.dtype)
        for split in ("train", "validation"):
            for shard in self._shards(split):
                for name, size in (
                    (shard.file, shard.tokens * self.dtype.itemsize),
                    (shard.index, shard.documents * DOCUMENT_OFFSETS.itemsize),
                ):
                    file = folder / name
                    if not file.exists() or file.stat().st_size != size:
                        raise ValueError(f"{file} is truncated or missing: delete {folder} and try again")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the tokens are of."""
        return load_tokenizer(self.folder / "tokenizer")

    def tokens(self, split: Split) -> int:
        """Number of tokens in a split, an end token for each document included."""
        return self.manifest.splits[split].tokens

    def text_sha256(self) -> str:
        """A hash of all text that was read, in its order."""
        return self.manifest.text_sha256

    def identity(self) -> DataIdentity:
        """What a run that trains on this was trained on."""
        return DataIdentity(
            kind="prepared",
            text_sha256=self.text_sha256(),
            tokenizer_sha256=tokenizer_sha256(self.tokenizer()),
            folder=str(self.folder.resolve()),
            train_tokens=self.tokens("train"),
            validation_tokens=self.tokens("validation"),
        )

    def sequences(self, split: Split, form: SequenceFormat) -> SequenceDataset:
        """The split as sequences.

        Raises:
            ValueError: for a split shorter than one sequence.
        """
        tokens, offsets = zip(*self.shards_of(split), strict=True)
        return sequences_of(
            list(tokens),
            list(offsets),
            form,
            end_token=self.manifest.end_token,
            pad_token=self.manifest.pad_token,
        )

    def shards_of(self, split: Split) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each shard its token ids, and the positions in it after each document's last token; memory-mapped."""
        return [
            (
                np.memmap(self.folder / shard.file, dtype=self.dtype, mode="r"),
                np.memmap(self.folder / shard.index, dtype=DOCUMENT_OFFSETS, mode="r"),
            )
            for shard in self._shards(split)
        ]

    def training(self, form: SequenceFormat, *, seed: int, num_sequences: int) -> ShuffledDataset:
        """The sequences of a training run, in their order."""
        return ShuffledDataset(self.sequences("train", form), seed, num_sequences)

    def validation(self, form: SequenceFormat, tokens: int | None = None) -> Dataset[dict[str, Tensor]]:
        """The first sequences of the validation split, as many as hold `tokens`; None: all."""
        return self.sequences("validation", form).take(tokens)

    def test(self, form: SequenceFormat, *, validation_tokens: int, tokens: int) -> Dataset[dict[str, Tensor]]:
        """Sequences of the validation split behind those that `validation` gives for `validation_tokens`.

        Raises:
            ValueError: where there are none.
        """
        return self.sequences("validation", form).skip(validation_tokens, tokens)

    def verify(self) -> None:
        """Reads everything and compares checksums.

        Raises:
            ValueError: naming the files that are altered or missing.
        """
        expected = {f"tokenizer/{name}": sha256 for name, sha256 in self.manifest.tokenizer.files.items()}
        for split in ("train", "validation"):
            for shard in self._shards(split):
                expected |= {shard.file: shard.sha256, shard.index: shard.index_sha256}
        wrong = [name for name, sha256 in expected.items() if sha256_of_file(self.folder / name) != sha256]
        if wrong:
            raise ValueError(f"{self.folder}: {', '.join(wrong)} not as prepared: delete the folder and prepare again")

    def _shards(self, split: Split) -> Sequence[Shard]:
        return self.manifest.splits[split].shards
