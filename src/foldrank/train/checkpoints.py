"""Checkpoints of a run in progress: whole or absent, with checksums, the newest few kept.

A checkpoint is the folder `checkpoints/checkpoint-STEP`: what `Trainer` saves (weights, optimizer, scheduler, random
states, position) and `manifest.json` with the id of the run, the step, and the size and SHA-256 of each file. It is
written in `checkpoints/partial/`, synced to the disk, and renamed when whole. Its content tells what it is.
"""

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from foldrank.atomic import sync, write_text
from foldrank.hf.checksums import read_checksums
from foldrank.provenance import sha256_of_file
from foldrank.structured import read_json_table, to_json

MANIFEST = "manifest.json"
PARTIAL = "partial"
PREFIX = "checkpoint-"


def commit_checkpoint(
    work: Path, folder: Path, *, keep: int, run_id: str | None, always_keep: Collection[int] = ()
) -> None:
    """Makes the written folder `work` the checkpoint `folder` of a run, and removes all but the newest `keep` and those
    of the steps `always_keep`.
    """
    files, known = {}, read_checksums(work) or {}  # written a moment ago: the weights are read once
    for file in sorted(path for path in work.rglob("*") if path.is_file()):
        name = str(file.relative_to(work))
        files[name] = {"bytes": file.stat().st_size, "sha256": known.get(name) or sha256_of_file(file)}
        sync(file)
    manifest = {"run": run_id, "step": step_of(folder), "files": files}
    write_text(work / MANIFEST, to_json(manifest, indent=2) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    work.rename(folder)
    sync(folder.parent)
    for old in checkpoints(folder.parent)[:-keep]:
        if step_of(old) not in always_keep:
            shutil.rmtree(old)


def copy_checkpoint(source: Path, folder: Path, *, run_id: str | None) -> None:
    """The checkpoint `source` of another run as the checkpoint `folder` of this one, whole or not at all."""
    work = folder.parent / PARTIAL / folder.name
    shutil.rmtree(work.parent, ignore_errors=True)
    shutil.copytree(source, work, ignore=shutil.ignore_patterns(MANIFEST))
    commit_checkpoint(work, folder, keep=1, run_id=run_id)
    shutil.rmtree(work.parent, ignore_errors=True)


def checkpoints(parent: Path) -> list[Path]:
    """The checkpoints in the folder `parent`, oldest first."""
    folders = [path for path in parent.glob(PREFIX + "*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which it was written: by its name, or where that does not say so, by its content.

    Raises:
        ValueError: where neither tells.
    """
    number = checkpoint.name.removeprefix(PREFIX)
    if number != checkpoint.name and number.isdigit():
        return int(number)
    try:
        return int(read_json_table(checkpoint / "trainer_state.json")["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint} is no checkpoint of a run: its trainer_state.json tells no step") from error


def run_of(checkpoint: Path) -> str | None:
    """The id of the run that wrote it; None in checkpoints of foldrank 0.1.

    Raises:
        ValueError: where it has no manifest.
    """
    run_id = _manifest(checkpoint).get("run")
    return run_id if isinstance(run_id, str) else None


def verify(checkpoint: Path) -> None:
    """Compares each file with the manifest.

    Raises:
        ValueError: naming the file that is missing, truncated or altered, and the checkpoint to use instead.
    """
    for name, expected in _manifest(checkpoint)["files"].items():
        file = checkpoint / name
        if not file.is_file():
            problem = "is missing"
        elif file.stat().st_size != expected["bytes"]:
            problem = f"has {file.stat().st_size} bytes, not {expected['bytes']}"
        elif sha256_of_file(file) != expected["sha256"]:
            problem = "is not what was written (its checksum differs)"
        else:
            continue
        raise ValueError(f"{file} {problem}{_instead(checkpoint)}")


def _manifest(checkpoint: Path) -> dict[str, Any]:
    try:
        manifest = read_json_table(checkpoint / MANIFEST)
        if not isinstance(manifest["files"], dict):
            raise TypeError("files")
        return manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint / MANIFEST} is missing or damaged{_instead(checkpoint)}") from error


def _instead(checkpoint: Path) -> str:
    try:
        before = [path for path in checkpoints(checkpoint.parent) if step_of(path) < step_of(checkpoint)]
    except ValueError:
        before = []
    if not before:
        return "; there is no earlier checkpoint: start again with --overwrite"
    return f"; go on from the one before it with --resume {before[-1]}"
