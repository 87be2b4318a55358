"""Checksums beside the weights: a checkpoint that changed since it was saved is noticed when it is read."""

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from foldrank.atomic import write_text
from foldrank.provenance import sha256_of_file
from foldrank.structured import read_json_table, to_json

CHECKSUMS = "checksums.json"
OF_TRAINING = ("*.bin", "*.pt", "*.pth", "trainer_state.json", "manifest.json")
"""Files that are no part of the model, and that come and go."""

ACCEPT = "--accept-changes"


def write_checksums(folder: Path) -> None:
    """Writes the SHA-256 of each file of a model beside them."""
    left_out = (CHECKSUMS, *OF_TRAINING)
    files = sorted(
        file for file in folder.iterdir() if file.is_file() and not any(fnmatch(file.name, name) for name in left_out)
    )
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
    expected = read_checksums(folder)
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


def read_checksums(folder: Path) -> Mapping[str, str] | None:
    """From the name of each file of a model to its SHA-256, as saved; None where that was not written.

    Raises:
        ValueError: where the file of checksums is damaged.
    """
    file = folder / CHECKSUMS
    if not file.is_file():
        return None
    sums = read_json_table(file).get("sha256")
    if not isinstance(sums, dict) or not sums or not all(isinstance(sha256, str) for sha256 in sums.values()):
        raise ValueError(f"{file} is damaged: it does not name files with their checksums")
    return sums
