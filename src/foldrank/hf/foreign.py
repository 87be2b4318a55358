"""Where files of others are read by libraries of others, which raise what they like."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Where files of others are read, or a model made of them runs: whatever a library raises becomes one line."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the tokenizers library panics with what is no Exception
        raise ValueError(f"{what}: {one_line_of(error) or type(error).__name__}") from error


def one_line_of(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())
