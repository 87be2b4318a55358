"""The order in which a weight's numbers lie in memory, for decoding on a CPU."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from foldrank.core.formatting import abbreviate
from foldrank.core.inventory import inventory
from foldrank.core.plain_linear import what_is_on

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryFormatReport:
    """What `to_column_major_` did.

    Example:
        >>> from foldrank import LowRankLinear
        >>> to_column_major_(nn.Sequential(LowRankLinear(8, 16, rank=2))).stored
        ('0.up',)
    """

    stored: tuple[str, ...]
    """Names of the linear layers whose weight now lies column by column."""
    skipped: Mapping[str, str]
    """From the name of a layer with more outputs than inputs that stayed as it was to the reason."""

    def summary(self) -> str:
        """One line: how many layers, and which were skipped."""
        skipped = f", skipped {abbreviate(self.skipped)}" if self.skipped else ""
        tall = len(self.stored) + len(self.skipped)
        return f"{len(self.stored)} of {tall} weights with more rows than columns lie column by column{skipped}"


@torch.no_grad()
def to_column_major_(model: nn.Module) -> MemoryFormatReport:
    """Lets the weight of each `nn.Linear` with more outputs than inputs lie in memory column by column.

    All outputs of one input are then side by side. Values, shapes, names and the files of a checkpoint stay the same;
    only strides differ. A CPU that decodes one sequence reads each weight once a token, for one vector. Row by row that
    is a dot product per output, as short as the rank is in an up-projection; column by column it is one long sum for
    all outputs, which comes nearer to the memory's bandwidth (benchmarks/README.md). A down-projection has long rows
    and stays as it is. Products with many tokens take the same time either way. Results differ by rounding. While it
    works, one weight is in memory twice.

    Returns:
        The report. A weight shared with another module, such as an embedding, stays: the other reads it by rows.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
        >>> to_column_major_(model).stored, model[1].weight.shape, model[1].weight.stride()
        (('1',), torch.Size([3, 2]), (1, 3))
    """
    contents, stored, skipped = inventory(model), [], {}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, linear in linears.items():
        if linear.out_features <= linear.in_features:
            continue
        if problem := what_is_on(linear):
            skipped[name] = problem
        elif contents.shared_with(linear._parameters["weight"], f"{name}.weight".removeprefix(".")):
            skipped[name] = "its weight is shared"
        else:
            weight: Any = linear.weight  # Any: pyright knows no such set_
            weight.set_(weight.T.contiguous().T)  # the parameter stays itself: others may hold it
            stored.append(name)
    report = MemoryFormatReport(stored=tuple(stored), skipped=skipped)
    logger.info(report.summary())
    return report
