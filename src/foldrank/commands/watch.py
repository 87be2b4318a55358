"""`foldrank watch`: a run or a study on the screen while it goes on, from what it writes alone."""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVERY = 2.0
"""Seconds between two looks."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command line."""
    parser.description = (
        "Show a run while it trains: its losses as a curve, tokens a second, the time that is left, the last "
        "evaluation; of a study what is done, what trains and what waits. It reads the log alone. A run that died is "
        "shown as dead, with the line that goes on with it. Ctrl-C ends the watching, not the run."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a run or of a study")
    parser.add_argument("--once", action="store_true", help="look once; so it is where the output is no terminal")
    parser.add_argument(
        "--every", type=_seconds, default=EVERY, metavar="SECONDS", help="between two looks (default: 2)"
    )


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is no time between 0.1 and 86400 seconds")
    return value


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Looks until the run or study ends; returns what was seen last."""
    if not (arguments.once or arguments.json) and sys.stdout.isatty():
        _follow(arguments.folder, arguments.every)
        return {"screen": ""}
    look = _look(arguments.folder, 78)
    return {**look.facts, "screen": look.screen}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Look:
    """What is to be seen of a run or a study now."""

    screen: str
    goes_on: bool
    """Whether more will come."""
    facts: dict[str, Any]
    """For programs."""


def _look(folder: Path, width: int) -> _Look:
    from foldrank.runs.run import is_study, read_run
    from foldrank.runs.watch import screen

    if is_study(folder):
        from foldrank.compare.queue import queue_screen, read_queue

        queue = read_queue(folder)
        facts = {
            "done": queue.done,
            "failed": queue.failed,
            "begun": [{"id": name, "state": run.state, "step": run.log.step} for name, run in queue.begun],
            "waiting": list(queue.waiting),
        }
        return _Look(screen=queue_screen(queue), goes_on=bool(queue.begun or queue.waiting), facts=facts)
    run = read_run(folder, at_a_glance=True)
    last = run.log.evaluations[-1] if run.log.evaluations else None
    facts = {
        "state": run.state,
        "step": run.log.step,
        "steps": run.steps,
        "val_loss": None if last is None else last.loss,
        "resume": run.resume_line if run.state in ("dead", "stopped") else None,
    }
    return _Look(screen=screen(run, width), goes_on=run.state == "running", facts=facts)


def _follow(folder: Path, every: float) -> None:
    from rich.live import Live
    from rich.text import Text

    from foldrank.console import console

    out = console()
    with Live(console=out, auto_refresh=False, vertical_overflow="crop") as live:
        look = None
        while look is None or look.goes_on:
            if look is not None:
                time.sleep(every)
            look = _look(folder, out.width - 1)
            live.update(Text(look.screen), refresh=True)


def show(result: dict[str, Any]) -> None:
    """Prints what was seen."""
    if result["screen"]:
        print(result["screen"])
