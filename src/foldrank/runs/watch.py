"""A run on a terminal's screen, from its log alone."""

import time

import plotext

from foldrank.report.formatting import count, loss, perplexity
from foldrank.runs.run import Run

RECENT = 20
"""Log entries that say how fast it is."""
HEIGHT = 14
"""Lines of the chart."""


def screen(run: Run, width: int) -> str:
    """How far a run is, its loss, its speed, and what to do where it ended early.

    Args:
        run: read at a glance.
        width: characters of a line of the chart.
    """
    log = run.log
    lines = [f"{run.name}, {run.path}: {_state(run)}"]
    done = f"step {count(log.step)}" + (f" of {count(run.steps)} ({log.step / run.steps:.0%})" if run.steps else "")
    figures = [done]
    if log.points:
        figures.append(f"training loss {loss(log.points[-1].loss)}")
    if (speed := tokens_per_second(run)) is not None:
        figures.append(f"{speed:,.0f} tokens/s")
    if run.state == "running" and (left := seconds_left(run)) is not None:
        figures.append(f"{duration(left)} of training left")
    lines.append(", ".join(figures))
    if log.evaluations:
        last = log.evaluations[-1]
        lines.append(
            f"last evaluation, after step {count(last.step)}: validation loss {loss(last.loss)}, "
            f"perplexity {perplexity(last.loss)}"
        )
    lines += [f"step {count(step)}: {note}" for step, note in log.notes[-3:]]
    if run.state in ("dead", "stopped"):
        lines.append(f"to go on: {run.resume_line}")
    return "\n".join([*lines, *([_chart(run, width)] if len(log.points) > 1 else [])])


def _state(run: Run) -> str:
    match run.state:
        case "dead":
            ago = "" if run.log.last_time is None else f", {duration(time.time() - run.log.last_time)} ago"
            return f"dead, its process is gone without a word (last entry: step {count(run.log.step)}{ago})"
        case "stopped":
            return f"ended early: {run.log.stopped}"
        case state:
            return state


def tokens_per_second(run: Run) -> float | None:
    """Of the newest entries; None where they say nothing of it."""
    per_step = run.log.tokens_per_step
    return per_step / each if per_step and (each := _seconds_per_step(run)) else None


def seconds_left(run: Run) -> float | None:
    """Until its last step, as fast as it is now, evaluations left out; None where that is not known."""
    each = _seconds_per_step(run)
    return None if each is None or not run.steps else max(0, run.steps - run.log.step) * each


def _seconds_per_step(run: Run) -> float | None:
    known = [point for point in run.log.points[-RECENT:] if point.seconds is not None]
    if len(known) < 2 or known[-1].step <= known[0].step:
        return None
    spent = (known[-1].seconds or 0.0) - (known[0].seconds or 0.0)
    return spent / (known[-1].step - known[0].step) if spent > 0 else None


def duration(seconds: float) -> str:
    """A time in two units.

    >>> duration(42), duration(3725), duration(200000)
    ('42 s', '1 h 2 min', '2 d 7 h')
    """
    for size, name, small, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {name} {int(seconds % size // small)} {part}"
    return f"{seconds:.0f} s"


def _chart(run: Run, width: int) -> str:
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(max(width, 30), HEIGHT)
    plotext.plot(
        [point.step for point in run.log.points],
        [point.loss for point in run.log.points],
        marker="braille",
        label="training loss",
    )
    if len(run.log.evaluations) > 1:
        steps, losses = zip(*((each.step, each.loss) for each in run.log.evaluations), strict=True)
        plotext.scatter(list(steps), list(losses), marker="o", label="validation loss")
    first, last = run.log.points[0].step, run.log.points[-1].step
    plotext.xticks(sorted({first + (last - first) * part // 4 for part in range(5)}))
    plotext.xlabel("step")
    return plotext.uncolorize(plotext.build())
