"""Small texts for the tests of the data."""

import random
from pathlib import Path

from foldrank.data.config import DataConfig
from foldrank.data.corpus import documents

SYLLABLES = ("ba", "ke", "lo", "mi", "nu", "sta", "rün", "de")


def some_texts(count: int, seed: int = 0, words: tuple[int, int] = (5, 60)) -> list[str]:
    """Different texts, the same for a seed."""
    draw = random.Random(seed)
    return [
        f"text {number} of {seed}:\n"
        + " ".join("".join(draw.choices(SYLLABLES, k=2)) for _ in range(draw.randrange(*words)))
        for number in range(count)
    ]


def write_folder(folder: Path, texts: list[str]) -> Path:
    """One file each, in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04}.txt").write_text(text, encoding="utf-8")
    return folder


def read(source: Path | str, **settings: object) -> list[str]:
    """The documents of a source as texts."""
    return [document.text for document in documents(DataConfig(source=str(source), **settings))]  # pyright: ignore[reportArgumentType]
