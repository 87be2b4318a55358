"""Checkpoints of a run in progress: whole or absent, with checksums, the newest few kept.

A checkpoint is the folder `checkpoints/checkpoint-STEP`: what `Trainer` saves (weights, optimizer, scheduler, random
states, position) and `manifest.json` with the size and SHA-256 of each file. It is written in `checkpoints/partial/`,
flushed to the disk, and renamed when whole.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

MANIFEST = "manifest.json"
PARTIAL = "partial"
PREFIX = "checkpoint-"


def finish(work: Path, folder: Path, *, keep: int) -> None:
    """Makes the written folder `work` the checkpoint `folder`, and removes all but the newest `keep`."""
    files = {}
    for file in sorted(path for path in work.rglob("*") if path.is_file()):
        files[str(file.relative_to(work))] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        _flush(file)
    manifest = work / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=2) + "\n")
    _flush(manifest)
    _flush(work)
    if folder.exists():
        shutil.rmtree(folder)
    work.rename(folder)
    _flush(folder.parent)
    for old in checkpoints(folder.parent)[:-keep]:
        shutil.rmtree(old)


def checkpoints(parent: Path) -> list[Path]:
    """The checkpoints in the folder `parent`, oldest first."""
    found = [path for path in parent.glob(PREFIX + "*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def verify(checkpoint: Path) -> None:
    """Compares each file with the manifest.

    Raises:
        ValueError: naming the file that is missing, truncated or altered, and the checkpoint to use instead.
    """
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{checkpoint / MANIFEST} is missing or damaged{_instead(checkpoint)}") from error
    for name, expected in files.items():
        file = checkpoint / name
        if not file.is_file():
            problem = "is missing"
        elif file.stat().st_size != expected["bytes"]:
            problem = f"has {file.stat().st_size} bytes, not {expected['bytes']}"
        elif _sha256(file) != expected["sha256"]:
            problem = "is not what was written (its checksum differs)"
        else:
            continue
        raise ValueError(f"{file} {problem}{_instead(checkpoint)}")


def _instead(checkpoint: Path) -> str:
    before = [path for path in checkpoints(checkpoint.parent) if step_of(path) < step_of(checkpoint)]
    if not before:
        return "; there is no earlier checkpoint: start again with --overwrite"
    return f"; go on from the one before it with --resume {before[-1]}"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
