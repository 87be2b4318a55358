"""What the charts are drawn with: how a method looks, its lines and bands, error bars."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from foldrank.compare import formatting
from foldrank.compare.analysis import Row, Table
from foldrank.compare.curves import Point
from foldrank.compare.statistics import Estimate
from foldrank.recipes.methods import DENSE
from foldrank.report.blocks import COLOURS, Look, Series

SYMBOLS = "osD^vP*h"


def looks(table: Table) -> dict[str, Look]:
    """A colour per backbone, solid with DLR and dashed without; where a kind has several methods, a colour each."""
    one_of_a_kind = len({row.kind for row in table.rows}) == len(table.rows)
    names = [row.kind.backbone if one_of_a_kind else row.method for row in table.rows]
    order = list(dict.fromkeys(names))
    return {
        row.method: Look(
            colour=order.index(name) % COLOURS + 1,
            symbol=SYMBOLS[(number + number // COLOURS) % len(SYMBOLS)],
            dash="dotted" if row.kind.backbone == DENSE else "solid" if row.kind.residual else "dashed",
        )
        for number, (row, name) in enumerate(zip(table.rows, names, strict=True))
    }


def points_only(look: Look) -> Look:
    """Without a line."""
    return replace(look, dash="")


def curve(row: Row, look: Look, abscissa: Callable[[Point], float | None]) -> Series | None:
    """A method's mean loss over `abscissa`, with a band over its seeds; None where nothing is known."""
    points = [(x, point) for point in row.curve if (x := abscissa(point)) is not None]
    if not points:
        return None
    band = [point.lowest for _, point in points], [point.highest for _, point in points]
    return Series(
        name=row.method,
        x=[x for x, _ in points],
        y=[point.mean for _, point in points],
        look=look,
        size=3,
        band=band if row.finished > 1 else None,
        labels=[f"{row.method}: {x:,.4g}, loss {formatting.loss(point.mean)}" for x, point in points],
    )


def half_widths(estimates: Sequence[Estimate]) -> list[float]:
    """Half the width of each confidence interval."""
    return [0.0 if each.ci_high is None else each.ci_high - each.mean for each in estimates]
