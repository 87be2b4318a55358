"""The charts of runs, laid over each other."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from foldrank.report.blocks import COLOURS, Chart, HeatMap, Look, Marks, Plot, Series
from foldrank.report.formatting import loss
from foldrank.runs.run import Run
from foldrank.runs.thin import Thinned, thin

Abscissa = Callable[[Run, Sequence[int]], list[float] | None]
"""From steps of a run to where they stand along an axis; None where the run does not say."""

Values = tuple[list[int], list[float]]
"""Steps, and what was there."""

MIB = 1 << 20
DOTS = 60
"""Evaluations of which each has a dot."""
BLOCKS_SHOWN = 48
"""Most rows of a heat map."""


def along_steps(_: Run, steps: Sequence[int]) -> list[float]:
    """The steps themselves."""
    return [float(step) for step in steps]


def along_tokens(run: Run, steps: Sequence[int]) -> list[float] | None:
    """Training tokens before each step's end."""
    metrics = run.metrics or {}
    per_step = run.log.tokens_per_step or _ratio(metrics.get("tokens"), metrics.get("steps"))
    return [step * per_step for step in steps] if per_step else None


def along_seconds(run: Run, steps: Sequence[int]) -> list[float] | None:
    """Seconds of training before each step's end."""
    logged, seconds = run.log.column("seconds")
    if not logged:
        return None
    return [seconds[min(bisect_left(logged, step), len(logged) - 1)] for step in steps]


AXES: tuple[tuple[str, str, Abscissa], ...] = (
    ("over steps", "Steps", along_steps),
    ("over tokens", "Training tokens", along_tokens),
    ("over training time", "Seconds of training", along_seconds),
)


class _Line(NamedTuple):
    name: str
    run: Run
    steps: list[int]
    values: Thinned
    look: Look
    labels: list[str] | None


def losses(runs: Sequence[tuple[str, Run]]) -> Chart | None:
    """Training and validation loss."""
    lines = [line for number, (name, run) in enumerate(runs) for line in _loss_lines(number, name, run, len(runs))]
    views = [(label, plot) for label, title, abscissa in AXES if (plot := _loss_plot(runs, lines, title, abscissa))]
    if not views:
        return None
    ends = "; ".join(f"{name} {loss(run.log.evaluations[-1].loss)}" for name, run in runs if run.log.evaluations)
    sentences = [
        f"Last validation loss: {ends}." if ends else "",
        "Lines are means of neighbouring steps, bands their lowest and highest."
        if any(line.values.grouped for line in lines)
        else "",
        "Upright lines: where a run went on from a checkpoint." if views[0][1].marks else "",
    ]
    return Chart(
        id="loss",
        title="Loss, in nats per token",
        description=" ".join(filter(None, sentences)) or "The training loss.",
        views=views,
        choose="Loss",
    )


def _loss_lines(number: int, name: str, run: Run, runs: int) -> Iterator[_Line]:
    several, log = f"{name}: " if runs > 1 else "", run.log
    for kind, entries, colour, dash in (
        ("training", log.points, 8, "solid"),
        ("validation", log.evaluations, 3, "dashed"),
    ):
        values = thin([each.step for each in entries], [each.loss for each in entries])
        if entries:
            dots = (kind == "validation" and len(values.x) <= DOTS) or len(values.x) == 1
            look = Look(colour=number % COLOURS + 1 if several else colour, symbol="o" if dots else "", dash=dash)
            labels = [f"{name}, {kind}, step {each.step:,}: {loss(each.loss)}" for each in entries] if dots else None
            yield _Line(f"{several}{kind}", run, [int(step) for step in values.x], values, look, labels)


def _loss_plot(runs: Sequence[tuple[str, Run]], lines: Sequence[_Line], title: str, abscissa: Abscissa) -> Plot | None:
    series = [
        Series(
            name=line.name,
            x=x,
            y=line.values.mean,
            band=(line.values.lowest, line.values.highest) if line.values.grouped else None,
            look=line.look,
            size=4,
            labels=line.labels,
        )
        for line in lines
        if (x := abscissa(line.run, line.steps))
    ]
    if not series:
        return None
    return Plot(series=series, x_title=title, y_title="Loss", marks=_went_on(runs, abscissa))


def _went_on(runs: Sequence[tuple[str, Run]], abscissa: Abscissa) -> Marks | None:
    places = [
        place
        for _, run in runs
        for place in abscissa(run, [each.step for each in run.log.sessions if each.step > 0]) or ()
    ]
    return Marks(name="went on", at=places) if places else None


def over_steps(runs: Sequence[tuple[str, Run]]) -> list[Chart]:
    """What else was logged."""
    charts = [
        _chart(runs, "rate", "Learning rate", _of("learning_rate"), "{:.3g}"),
        _chart(runs, "norm", "Gradient norm", _of("grad_norm"), "{:.3g}", log=True),
        _chart(runs, "speed", "Tokens per second", _of("speed"), "{:,.0f}"),
        _chart(runs, "mfu", "Model FLOPs utilization, per cent", _mfu, "{:.1f}"),
        _chart(runs, "memory", "Peak memory, MiB", lambda run: _scaled(_of("memory")(run), 1 / MIB), "{:,.0f}"),
    ]
    return [chart for chart in charts if chart is not None]


def _of(name: str) -> Callable[[Run], Values]:
    return lambda run: run.log.column(name)


def _scaled(values: Values, factor: float) -> Values:
    return values[0], [factor * value for value in values[1]]


def _mfu(run: Run) -> Values:
    log = run.log
    if not (log.peak_flops and log.flops_per_step and log.tokens_per_step):
        return [], []
    return _scaled(_of("speed")(run), 100 * log.flops_per_step / log.tokens_per_step / log.peak_flops)


def _chart(
    runs: Sequence[tuple[str, Run]],
    identity: str,
    title: str,
    values: Callable[[Run], Values],
    form: str,
    *,
    log: bool = False,
) -> Chart | None:
    series, ends = [], []
    for number, (name, run) in enumerate(runs):
        steps, known = values(run)
        if known:
            line = thin(steps, known)
            # A norm of zero has no logarithm.
            log = log and min(line.lowest) > 0
            look = Look(colour=number % COLOURS + 1 if len(runs) > 1 else 3, symbol="" if len(line.x) > 1 else "o")
            band = (line.lowest, line.highest) if line.grouped else None
            series.append(Series(name=name, x=line.x, y=line.mean, band=band, look=look))
            ends.append(f"{name}, at the end: {form.format(line.mean[-1])}")
    if not series:
        return None
    plot = Plot(series=series, x_title="Steps", y_title="", log_y=log, marks=_went_on(runs, along_steps), height=170)
    return Chart(id=identity, title=title, description=f"{'; '.join(ends)}.", views=[("all", plot)])


def by_layer(identity: str, title: str, description: str, values: dict[str, float], form: str) -> Chart | None:
    """A heat map: blocks from top to bottom, their layers from left to right; None without values."""
    cells = {name: _place(name) for name in values}
    rows = list(dict.fromkeys(block for block, _ in cells.values()))[:BLOCKS_SHOWN]
    columns = list(dict.fromkeys(layer for _, layer in cells.values()))
    if not rows:
        return None
    by_place = {cells[name]: value for name, value in values.items()}
    cut = f" The first {BLOCKS_SHOWN} blocks." if len({block for block, _ in cells.values()}) > len(rows) else ""
    heat = HeatMap(
        columns=columns,
        rows=rows,
        values=[[by_place.get((row, column)) for column in columns] for row in rows],
        format=form,
    )
    return Chart(id=identity, title=title, description=f"{description}{cut}", views=[("all", heat)])


def _place(layer: str) -> tuple[str, str]:
    """The block and the layer in it: ("0", "q_proj") of model.layers.0.self_attn.q_proj."""
    parts = layer.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdecimal()]
    return (".".join(parts[at] for at in numbers), parts[-1]) if numbers else ("", layer)


def _ratio(one: object, other: object) -> float | None:
    return one / other if isinstance(one, int | float) and isinstance(other, int | float) and other else None
