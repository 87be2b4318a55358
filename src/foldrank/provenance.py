"""What something was made with: versions, the commit of this source tree, checksums of files."""

import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("foldrank", "torch", "transformers", "accelerate", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide on numbers; "source" where one has no metadata."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def commit() -> str | None:
    """The git commit of foldrank's source tree; None where it is not in one, or there is no git to ask."""
    here = Path(__file__)
    # An environment may lie inside of somebody else's repository, which does not know this file.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _git(here.parent, "rev-parse", "HEAD")


def sha256_of_file(file: Path) -> str | None:
    """The checksum of a file; None where there is none."""
    if not file.is_file():
        return None
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "source"


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
