"""Where a result cannot be printed: a reader who went away is no error, a full disk is one line."""

import os
import subprocess
import sys

import pytest

from foldrank.console import console

COMMANDS = (["plan", "demo"], ["completion", "bash", "--json"])


def call(arguments: list[str], stdout: int) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "foldrank", *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_reader_who_went_away_ends_it_without_a_word(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert call(arguments, writer) == (128 + 13, "")
    os.close(writer)


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_device_without_room_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        code, stderr = call(arguments, full.fileno())
    assert (code, stderr) == (2, f"foldrank {arguments[0]}: [Errno 28] No space left on device\n")


def test_what_goes_to_standard_error_is_left_out_where_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w", buffering=1)  # noqa: SIM115 - closing it raises again
    monkeypatch.setattr(sys, "stderr", stream)
    screen = console(stderr=True)
    screen.print("a")
    screen.print("b")
    assert screen.quiet
    with pytest.raises(BrokenPipeError):
        stream.close()
