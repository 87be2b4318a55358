"""Types of command-line values: numbers within bounds, said where they are not."""

import argparse
import math
from collections.abc import Callable
from typing import Any

from foldrank.structured import parse_yaml


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number, decimal, from `least` to `most`."""

    def whole(text: str) -> int:
        digits = text.removeprefix("-")
        if not digits.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
        # Python converts some thousand digits at most; the first thirty are beyond any bound already.
        value = int(text[: len(text) - len(digits)] + (digits.lstrip("0") or "0")[:30])
        if not least <= value <= most:
            bound = f"at least {least}" if value < least else f"at most {most:,}"
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text}")
        return value

    return whole


def setting_value(text_may_be_null: bool | None) -> Callable[[str], Any]:
    """The type of an argument that is a setting: text as it is typed, anything else as YAML.

    Args:
        text_may_be_null: of a setting that is text, whether `null` is none of it; None: it is no text.
    """

    def value(text: str) -> Any:
        if text_may_be_null is not None:
            return None if text == "null" and text_may_be_null else text
        if not text.strip():
            raise argparse.ArgumentTypeError("it is empty; null is off")
        try:
            return parse_yaml(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not a YAML value: {error}") from error

    return value


def add_gpu_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the number of GPUs, and the share of their peak that training reaches."""
    parser.add_argument(
        "--gpus", type=whole_number(1, 1 << 20), default=1, metavar="N", help="GPUs, one process each (default: 1)"
    )
    parser.add_argument(
        "--mfu",
        type=number(0, 1),
        default=1.0,
        metavar="F",
        help="share of the peak that training reaches (default: 1, so that the hours are a lower bound)",
    )


def mfu_of(arguments: argparse.Namespace) -> float:
    """The share of the peak that is asked for.

    Raises:
        ValueError: for 0.
    """
    if not arguments.mfu > 0:
        raise ValueError(f"--mfu must lie in (0, 1], got {arguments.mfu}: it is a share, 0.4 for 40 %")
    return arguments.mfu


def number(least: float, most: float = math.inf) -> Callable[[str], float]:
    """The type of an argument that is a finite number from `least` to `most`."""

    def real(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not (math.isfinite(value) and least <= value <= most):
            upper = "" if math.isinf(most) else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"must be a number of at least {least:g}{upper}, got {text}")
        return value

    return real


def with_notes(result: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """A command's result with what the user should know of it, where there is something: the command line says it."""
    return result | ({"notes": notes} if notes else {})
