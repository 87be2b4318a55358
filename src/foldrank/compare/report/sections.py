"""From an analysis to the blocks of its report."""

from foldrank.compare import words
from foldrank.compare.analysis import Analysis
from foldrank.compare.report.blocks import Block, Document, Points, Section, Terms, Text, grid
from foldrank.compare.report.tables import table_section
from foldrank.compare.summary import heading, summary
from foldrank.compare.words import NONE

TERMS = (
    ("low rank", "a layer whose matrix is the product of two thin ones, B A, of rank r: fewer parameters, less work."),
    ("DLR", "a fixed residual without parameters, added to each low-rank layer while it trains (arXiv 2606.28932)."),
    (
        "fold",
        "after training the residual is added to B once and for all: what is deployed is the plain low-rank model.",
    ),
    ("seed", "the number from which the weights at the start and the order of the data are drawn."),
    ("sweep", "short runs with seeds of their own that try learning rates; the best one is used in the final runs."),
    ("final run", "a run that is compared. Each method has one for each seed."),
    (
        "loss",
        "mean of −log(probability of the next token), in nats per token: lower is better. Perplexity is exp(loss).",
    ),
    ("validation, test", "held-out text that chose the learning rate, and other held-out text that chose nothing."),
    ("paired difference", "the mean over seeds of one method's loss less the other's with the same seed."),
    (
        "95 % interval",
        "mean ± t · s / √n by Student's t over the seeds. Of such intervals 95 % hold the true mean. It speaks of other "
        "seeds, not of other corpora, sizes or settings.",
    ),
)


def document(analysis: Analysis) -> Document:
    """The whole report."""
    sections = [
        Section(id="summary", title="In short", blocks=_summary(analysis)),
        Section(id="reading", title="How to read this", blocks=_reading(analysis)),
        *(table_section(table, place, analysis.records) for place, table in enumerate(analysis.tables, 1)),
        Section(id="runs", title="Runs that are not in the tables", blocks=_left_out(analysis)),
        Section(id="making", title="How this was made", blocks=_making(analysis)),
    ]
    return Document(
        title=analysis.title, question=analysis.question, banner=_banner(analysis), sections=tuple(sections)
    )


def _banner(analysis: Analysis) -> str | None:
    missing = analysis.finals_expected - analysis.finals_done
    if not missing:
        return None
    running = f" {len(analysis.unfinished)} began and are not done." if analysis.unfinished else ""
    return (
        f"This study is not complete: {analysis.finals_done} of {analysis.finals_expected} final runs are done, "
        f"{missing} are missing; {analysis.sweeps_done} runs of the sweep are done.{running} All below is made from "
        "what is there."
    )


def _summary(analysis: Analysis) -> list[Block]:
    found: list[Block] = []
    for title, sentences in summary(analysis):
        found += [Text(text=f"{title}:"), Points(items=sentences)]
    if not found:
        return [Text(text="Nothing can be compared yet.")]
    found.append(
        Text(
            text="Each sentence repeats a paired difference of the test loss from the tables below: its mean, its 95 % "
            "interval and the number of seeds.",
            note=True,
        )
    )
    return found


def _reading(analysis: Analysis) -> list[Block]:
    by_chance = analysis.comparisons * 0.05
    return [
        Text(
            text="Each method trains the same model on the same data in the same order, once per seed, with the learning "
            "rate that was best for it in a sweep. So a difference between two methods is taken seed by seed. A method "
            "counts as better or worse only where the whole 95 % interval of the difference lies on one side of zero."
        ),
        Text(
            text=f"This report makes {analysis.comparisons} such comparisons. Each interval stands by itself: none is "
            f"corrected for their number. If no methods differed at all, about {by_chance:.1f} of them would still be "
            "expected to lie on one side of zero."
        ),
        Terms(items=TERMS),
    ]


def _left_out(analysis: Analysis) -> list[Block]:
    blocks: list[Block] = []
    if analysis.failures:
        blocks += [
            Text(text="Runs that failed. They count as failed in the tables and are part of no mean."),
            grid(
                "failures",
                "Failed runs",
                "Run|Corpus|Size|Method|Stage|Learning rate>|Seed>|Error",
                [
                    (
                        *(run.id, run.corpus, run.size, run.method, run.stage),
                        *(words.rate(run.learning_rate), str(run.seed), run.error),
                    )
                    for run in analysis.failures
                ],
            ),
        ]
    else:
        blocks.append(Text(text="No run failed."))
    missing = [
        f"{heading(table)}: {row.method}, seeds {', '.join(map(str, row.missing))}"
        for table in analysis.tables
        for row in table.rows
        if row.missing and not row.reference
    ]
    if missing:
        blocks += [Text(text="Final runs that are still missing:"), Points(items=missing)]
    else:
        blocks.append(Text(text="No final run is missing."))
    if analysis.unfinished:
        blocks.append(
            grid(
                "unfinished",
                "Runs that began and are not done",
                "Run|Step>|Training loss there>",
                [
                    (run.id, words.count(run.step), NONE if run.loss is None else words.loss(run.loss))
                    for run in analysis.unfinished
                ],
            )
        )
    if analysis.strangers:
        text = f"Records of what the study does not name any more, in no table: {', '.join(analysis.strangers)}."
        blocks.append(Text(text=text))
    return blocks


def _making(analysis: Analysis) -> list[Block]:
    rows = [(name.replace("_", " "), ", ".join(values)) for name, values in analysis.made_with.items()]
    blocks: list[Block] = [
        Text(
            text=f"Seeds of the final runs: {', '.join(map(str, analysis.seeds))}; of the sweep: "
            f"{', '.join(map(str, analysis.sweep_seeds))}. Every number was made from the files records/NAME.json that "
            "stand in the last column of its row, as shell patterns, and from study.yaml; foldrank report makes "
            "this page again from these."
        )
    ]
    return [*blocks, grid("made-with", "What the runs ran on", "What|Values", rows)] if rows else blocks
