"""The door for packages of the extras, which need not be installed."""

from importlib import import_module
from typing import Any


def needed(module: str, purpose: str, *, extra: str = "data") -> Any:
    """Imports a module of an extra, such as `foldrank[data]`.

    Raises:
        ValueError: where it is not installed, with the command that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(f"{purpose} needs the package {package}: pip install 'foldrank[{extra}]'") from error
