"""The part of a report on fine-tuning."""

from foldrank.compare import formatting
from foldrank.compare.analysis import Table
from foldrank.compare.formatting import NONE
from foldrank.compare.report.cells import PAIR_COLUMNS, pair_cells, sources
from foldrank.compare.summary import heading
from foldrank.report.blocks import Block, Text, grid

ABOUT = """\
The folded model of each final run, fine-tuned with the run's seed on the same examples in the same order. The loss is
of held-out examples, in nats per token that counts, or per example where it classifies; chance is the accuracy of
always saying the commonest label."""


def transfer_blocks(table: Table, where: str) -> list[Block]:
    """Nothing where the study fine-tunes nothing."""
    if not table.transfers:
        return []
    rows = [
        (
            each.task,
            each.method,
            str(each.after.seeds),
            formatting.loss(each.before.mean),
            formatting.loss(each.after.mean),
            formatting.span(each.after, formatting.loss),
            NONE if each.accuracy is None else formatting.loss(each.accuracy.mean),
            formatting.span(each.accuracy, formatting.loss),
            NONE if each.chance is None else formatting.loss(each.chance),
            sources(each.records),
        )
        for each in table.transfers
    ]
    pairs = [(each.task, *pair_cells(each.method, pair)) for each in table.transfers for pair in each.against]
    blocks: list[Block] = [
        Text(text=ABOUT),
        grid(
            f"{where}-transfer-table",
            f"After fine-tuning, {heading(table)}",
            "Task|Method|Seeds>|Loss before>|Loss after>|95 % interval>|Accuracy>|95 % interval>|Chance>|Records",
            rows,
        ),
    ]
    if pairs:
        caption = f"Paired differences of the loss after fine-tuning, {heading(table)}"
        blocks.append(grid(f"{where}-transfer-pairs", caption, f"Task|{PAIR_COLUMNS}", pairs))
    return blocks
