"""Checksums beside the weights: a checkpoint that changed since it was saved is noticed when it is read."""

from collections.abc import Mapping
from pathlib import Path

from foldrank.atomic import write_text
from foldrank.provenance import sha256_of_file
from foldrank.structured import read_json_table, to_json

CHECKSUMS = "checksums.json"
TRAINING_MANIFEST = "manifest.json"
"""What a checkpoint of a run in progress has instead."""

ACCEPT = "--accept-changes"


def write_checksums(folder: Path) -> None:
    """Writes the SHA-256 of each file of a checkpoint beside them."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != CHECKSUMS)
    write_text(folder / CHECKSUMS, to_json({"sha256": {file.name: sha256_of_file(file) for file in files}}, 2) + "\n")


def verify_checksums(folder: Path, *, accept: bool = False) -> str | None:
    """Compares a checkpoint's files with their checksums, which reads all of them once.

    Args:
        folder: the checkpoint.
        accept: let files that another tool has rewritten pass.

    Returns:
        What to tell the user: that nothing could be compared, or what was accepted; None where all is as saved.

    Raises:
        ValueError: naming the file that is altered or missing, and how to accept it.
    """
    expected = _expected(folder)
    if expected is None:
        return f"{folder} has no {CHECKSUMS}: not verified"
    wrong = [name for name, sha256 in expected.items() if sha256_of_file(folder / name) != sha256]
    if not wrong:
        return None
    names = ", ".join(wrong)
    if not accept:
        raise ValueError(
            f"{folder}: {names} not as saved (checksums differ): restore what is damaged, or, where another tool has "
            f"rewritten it, take it as it is with {ACCEPT}"
        )
    return f"{folder}: {names} not as saved, and accepted"


def _expected(folder: Path) -> Mapping[str, str] | None:
    for file, field in ((folder / CHECKSUMS, "sha256"), (folder / TRAINING_MANIFEST, "files")):
        if not file.is_file():
            continue
        files = read_json_table(file).get(field)
        if not isinstance(files, dict):
            raise ValueError(f"{file} is damaged: it has no {field}")
        entries = {name: entry.get("sha256") if isinstance(entry, dict) else entry for name, entry in files.items()}
        sums = {name: sha256 for name, sha256 in entries.items() if isinstance(sha256, str)}
        if not sums or len(sums) < len(entries):
            raise ValueError(f"{file} is damaged: it does not name files with their checksums")
        # Of a run in progress, what belongs to training is none of the model.
        return {name: sha256 for name, sha256 in sums.items() if Path(name).name == name}
    return None
