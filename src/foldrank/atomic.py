"""Files that are written whole or not at all."""

import os
from pathlib import Path


def write(file: Path, text: str) -> None:
    """Writes a text file, whole or not at all.

    Raises:
        OSError: where it cannot be written.
    """
    # Each process has a name of its own: several may write one file at once.
    work = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        work.write_text(text, encoding="utf-8")
        work.replace(file)
    finally:
        work.unlink(missing_ok=True)
