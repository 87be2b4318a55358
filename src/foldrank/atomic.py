"""Files and folders that are written whole or not at all, and are on the disk when they have their name."""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PRIVATE = 0o600
"""Mode of what some libraries write, safetensors and onnx among them, whatever the user's umask."""


def write_text(file: Path, text: str) -> None:
    """Writes a text file, whole or not at all.

    Raises:
        OSError: where it cannot be written.
    """
    work = _work_name(file)
    try:
        work.write_text(text, encoding="utf-8")
        sync(work)
        work.replace(file)
        sync(file.parent)
    finally:
        work.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill in a `with` block, which takes the name `folder` when the block ends, or goes when it raises.

    Args:
        folder: must not exist, unless `replace`.
        replace: let it take the place of what is there.

    Raises:
        FileExistsError: where `folder` exists and is not to be replaced; what was written is removed.
        OSError: where something cannot be written.
    """
    with parents_of(folder):
        work = _work_name(folder)
        work.mkdir()
        try:
            yield work
            for path in sorted(work.rglob("*")):
                if path.is_file() and stat.S_IMODE(path.stat().st_mode) == PRIVATE:
                    path.chmod(_usual_mode(work))
                sync(path)
            sync(work)
            if replace and folder.is_dir():
                shutil.rmtree(folder)
            elif folder.exists():
                raise FileExistsError(f"{folder} appeared meanwhile: choose another folder, or move it away")
            work.rename(folder)
            sync(folder.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _usual_mode(folder: Path) -> int:
    """Of a new file, by the user's umask."""
    file = folder / ".mode"
    file.touch()
    try:
        return stat.S_IMODE(file.stat().st_mode)
    finally:
        file.unlink()


def refuse_existing(out: Path, *, option: str = "") -> None:
    """Refuses a name that something has.

    Args:
        out: the name.
        option: of the command line, by which another is given.

    Raises:
        FileExistsError: naming it.
    """
    if os.path.lexists(out):
        by = f" with {option}," if option else ""
        raise FileExistsError(f"{out} exists: choose another folder{by} or delete it")


@contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """Makes the folders above `path`; where the block raises, those that it made go again, if nothing is in them."""
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _work_name(path: Path) -> Path:
    """A name beside `path` that nothing has: neither another process's, nor a user's."""
    names = (path.with_name(f".{path.name}.{os.getpid()}.{number}.partial") for number in range(1000))
    return next(name for name in names if not os.path.lexists(name))
