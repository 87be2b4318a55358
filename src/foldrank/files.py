"""Files that are written whole or not at all."""

from pathlib import Path


def write(file: Path, text: str) -> None:
    """Writes a text file, whole or not at all.

    Raises:
        OSError: where it cannot be written.
    """
    work = file.with_name(f"{file.name}.partial")
    try:
        work.write_text(text, encoding="utf-8")
        work.replace(file)
    finally:
        work.unlink(missing_ok=True)
