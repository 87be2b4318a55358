"""The door for output: what comes from outside is never markup, and a message is one line of bounded length."""

import io
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

MAX_MESSAGE = 300
"""Characters of a message, the command's name included."""


def speaks_for_all() -> bool:
    """Whether this process is the one of those that share a run, under torchrun, which says what all would say."""
    return os.environ.get("RANK", "0") == "0"


def setup_streams() -> None:
    """UTF-8 on both streams, whatever the locale; what that cannot spell is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def console(**settings: Any) -> "Console":
    """A console on standard output, or with `stderr=True` on standard error, that takes text as it is: a path such as
    `runs/[bold]` is no markup, `:smile:` no emoji, and no number gets a colour. Where nobody reads any more, a result
    raises BrokenPipeError, and what goes to standard error is left out: a run goes on although nobody watches it.
    """
    from rich.console import Console

    class Door(Console):
        def on_broken_pipe(self) -> None:
            """In place of rich's exit with 1.

            Raises:
                BrokenPipeError: where whoever read a result went away, `head` for one.
            """
            if not self.stderr:
                raise BrokenPipeError("nobody reads the output any more")
            self.quiet = True

    return Door(markup=False, highlight=False, emoji=False, **settings)


def one_line(text: object, limit: int = MAX_MESSAGE) -> str:
    """`text` on one line of printable characters; of a longer one both ends, which say what is wrong and what to do."""
    line = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in " ".join(str(text).split())
    )
    if len(line) <= limit:
        return line
    end = limit // 2
    return f"{line[: limit - end - 5]} ... {line[-end:]}"
