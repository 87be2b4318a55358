"""The index of Megatron-LM's token files: PREFIX.idx beside PREFIX.bin (its `indexed_dataset.py`, version 1).

9 bytes MMIDIDX and two zeros, u64 version, u8 code of the dtype, u64 sequences, u64 document indices,
i32 length of each sequence, i64 place of each in the .bin file, i64 for each document its first sequence
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Of token ids, by code; 6 and 7 are floating-point numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronIndex:
    """Where the documents of a .bin file end."""

    dtype: np.dtype
    document_offsets: np.ndarray
    """Positions after each document's last token, int64."""

    @classmethod
    def read(cls, file: Path, size: int) -> "MegatronIndex":
        """The index in `file`, of a .bin file of `size` bytes.

        Raises:
            ValueError: naming what is wrong.
        """
        content = file.read_bytes()
        if len(content) < HEADER.size or not content.startswith(MAGIC):
            raise ValueError(f"{file} is no index of Megatron: it does not begin with MMIDIDX")
        _, version, code, sequences, documents = HEADER.unpack_from(content)
        expected = HEADER.size + 12 * sequences + 8 * documents
        if version != 1 or code not in DTYPES:
            raise ValueError(f"{file}: version {version} and dtype code {code} are not known (version 1, integers)")
        if len(content) != expected:
            raise ValueError(f"{file} has {len(content):,} bytes where its header says {expected:,}: it is damaged")
        lengths = np.frombuffer(content, "<i4", sequences, HEADER.size).astype(np.int64)
        places = np.frombuffer(content, "<i8", sequences, HEADER.size + 4 * sequences)
        firsts = np.frombuffer(content, "<i8", documents, HEADER.size + 12 * sequences)
        dtype, ends = np.dtype(DTYPES[code]), np.cumsum(lengths)
        if (lengths < 0).any() or not np.array_equal(places, (ends - lengths) * dtype.itemsize):
            raise ValueError(f"{file} is damaged: its sequences do not follow one another")
        whole = documents and firsts[0] == 0 and firsts[-1] == sequences and (np.diff(firsts) >= 0).all()
        if not whole:
            raise ValueError(f"{file} is damaged: its documents do not follow one another")
        if size != (total := int(lengths.sum()) * dtype.itemsize):
            raise ValueError(f"{file.with_suffix('.bin')} has {size:,} bytes where its index says {total:,}")
        return cls(dtype=dtype, document_offsets=np.concatenate([[0], ends])[firsts[1:]])

    def write(self, file: Path) -> None:
        """Writes the index, a sequence for each document.

        Raises:
            OSError: where it cannot be written.
        """
        code = next(code for code, name in DTYPES.items() if np.dtype(name) == self.dtype)
        lengths = np.diff(self.document_offsets, prepend=0)
        places = (self.document_offsets - lengths) * self.dtype.itemsize
        count = len(lengths)
        with file.open("wb") as out:
            out.write(HEADER.pack(MAGIC, 1, code, count, count + 1))
            for array, dtype in ((lengths, "<i4"), (places, "<i8"), (np.arange(count + 1), "<i8")):
                out.write(array.astype(dtype).tobytes())
