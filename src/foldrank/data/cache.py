"""Where prepared data is kept, and the locks of this machine's processes beside it."""

import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock

from foldrank.data.config import DataConfig
from foldrank.data.corpus import fingerprint
from foldrank.data.manifest import FORMAT
from foldrank.provenance import sha256_of_file

TOKENIZER_FILES = ("tokenizer*", "special_tokens*", "vocab*", "merges*", "*.model")
"""Of a folder with a tokenizer, what makes the tokenizer."""


def cache_folder() -> Path:
    """Where prepared data is kept: $FOLDRANK_CACHE, or foldrank/ in the user's cache folder."""
    if named := os.environ.get("FOLDRANK_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foldrank"
    except RuntimeError as error:  # no home: a user id without an entry in /etc/passwd
        raise ValueError("there is no home folder to keep prepared data in: name one with FOLDRANK_CACHE") from error


def key_of(config: DataConfig) -> str:
    """What prepared data of these settings is called there: settings, and what local files hold."""
    digest = hashlib.sha256(json.dumps([FORMAT, asdict(config)]).encode() + fingerprint(config))
    if config.tokenizer is not None and (folder := Path(config.tokenizer)).is_dir():
        for file in sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}):
            digest.update(f"{file.name}\0{sha256_of_file(file)}".encode())
    return digest.hexdigest()[:16]


def machine_lock(what: str, path: Path) -> FileLock:
    """What one process of this machine holds at a time, until it lets go or ends: `what` is done, with a whole path."""
    return FileLock(lock_folder() / f"{what}-{hashlib.sha256(str(path).encode()).hexdigest()[:16]}", thread_local=False)


def lock_folder() -> Path:
    """In the cache, or where that cannot be written, in the folder for temporary files."""
    try:
        locks = cache_folder() / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        if os.access(locks, os.W_OK):
            return locks
    except (OSError, ValueError):
        pass
    locks = Path(tempfile.gettempdir()) / f"foldrank-locks-{os.getuid()}"
    locks.mkdir(parents=True, exist_ok=True)
    return locks
