"""The command line as a function, as the tests of the commands have it."""

from ..commands.conftest import foldrank

__all__ = ["foldrank"]
