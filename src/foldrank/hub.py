"""The door to the Hugging Face hub: what is downloaded from it by name, and one line where that cannot be."""

from collections.abc import Sequence
from pathlib import Path

PREFIX = "hf://"
"""Before the name of a repository on the hub, where a folder could be meant too."""

CHECKPOINT = (
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.md",
    "*.onnx*",
    "model.xml",
    "model.bin",
    "chat_template*",
)
"""Of a repository, what a checkpoint needs: no code, no pickles, no weights in other formats."""

TIMEOUT = 10.0
"""Seconds after which the hub counts as out of reach; its library tries for half a minute."""


def is_reachable() -> bool:
    """Whether the hub answers."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # its own for a mode without network, and those of the library below it
        return False
    return True


def download(name: str, patterns: Sequence[str] = CHECKPOINT) -> Path:
    """The folder with the files of a repository that match, downloaded, or from the cache where it holds them.

    Args:
        name: `owner/name`, or `owner/name@revision`.
        patterns: of the files' names.

    Raises:
        ValueError: in one line, where there is no such repository, or no network and nothing in the cache.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    online = is_reachable()
    try:
        folder = snapshot_download(
            repository, revision=revision or None, allow_patterns=list(patterns), local_files_only=not online
        )
    except Exception as error:  # as above
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        offline = "the hub cannot be reached, and its cache on this machine does not hold it"
        raise ValueError(f"{name}: {reason if online else offline}") from error
    return Path(folder)
