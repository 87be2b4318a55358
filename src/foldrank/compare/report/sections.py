"""From an analysis to the blocks of its report."""

from foldrank.compare import formatting
from foldrank.compare.analysis import Analysis, Table
from foldrank.compare.formatting import NONE
from foldrank.compare.headline import headline, main_tables
from foldrank.compare.report import charts, prose
from foldrank.compare.report.tables import table_section
from foldrank.compare.statistics import LEVEL
from foldrank.compare.summary import heading, summary
from foldrank.report.blocks import Block, Document, Points, Section, Terms, Text, grid


def document(analysis: Analysis) -> Document:
    """The whole report."""
    sections = [
        _answer(analysis),
        _verdicts(analysis),
        Section(id="reading", title="How to read this", blocks=_reading(analysis)),
        *(table_section(table, number) for number, table in enumerate(filter(_begun, analysis.tables), 1)),
        Section(id="runs", title="Runs that are not in the tables", blocks=_left_out(analysis)),
        Section(id="making", title="How this was made", blocks=_making(analysis)),
    ]
    return Document(
        title=analysis.title,
        question=analysis.question,
        banner=_banner(analysis),
        sections=tuple(sections),
        footer="Made by foldrank report from study.yaml and records/.",
    )


def _begun(table: Table) -> bool:
    """Whether there is any run of the methods of its own; those still missing are listed in any case."""
    return any(row.rates or row.finished or row.failed for row in table.rows if not row.reference)


def _banner(analysis: Analysis) -> str | None:
    missing = analysis.final_records_expected - analysis.final_records_done
    if not missing:
        return None
    running = f" Begun and not done: {len(analysis.unfinished)}." if analysis.unfinished else ""
    return (
        f"This study is not complete. Final runs: {analysis.final_records_done} of {analysis.final_records_expected} "
        f"done, {missing} missing. Runs of the sweep: {analysis.sweeps_done} done.{running} All below is made from "
        "what is there."
    )


def _answer(analysis: Analysis) -> Section:
    sentences = headline(analysis) or ("Nothing can be compared yet.",)
    pictures = charts.answer(main_tables(analysis))
    return Section(id="answer", title="In short", blocks=[*(Text(text=text) for text in sentences), *pictures])


def _verdicts(analysis: Analysis) -> Section:
    parts = [
        Section(id=f"verdicts-{number}", title=title, blocks=[Points(items=sentences)])
        for number, (title, sentences) in enumerate(summary(analysis), 1)
    ]
    text = prose.VERDICTS if parts else "There is none yet."
    return Section(id="verdicts", title="Verdicts one by one", blocks=[Text(text=text)], parts=parts)


def _reading(analysis: Analysis) -> list[Block]:
    pairs = [pair for table in analysis.tables for row in table.rows for pair in row.against]
    tests = sum(pair.difference.verdict != "too few seeds" for pair in pairs)
    count = analysis.comparisons
    return [
        Text(text=prose.READING),
        Text(text=prose.COMPARISONS.format(count=count, tests=tests, chance=count * (1 - LEVEL))),
        Terms(items=prose.TERMS),
    ]


def _left_out(analysis: Analysis) -> list[Block]:
    blocks: list[Block] = []
    if analysis.failures:
        blocks += [
            Text(text=prose.FAILED),
            grid(
                "failures",
                "Failed runs",
                "Run|Corpus|Size|Method|Stage|Learning rate>|Seed>|Error",
                [
                    (
                        *(run.id, run.corpus, run.size, run.method, run.stage),
                        *(formatting.rate(run.learning_rate), str(run.seed), run.error),
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
                    (run.id, formatting.count(run.step), NONE if run.loss is None else formatting.loss(run.loss))
                    for run in analysis.unfinished
                ],
            )
        )
    if analysis.orphaned_records:
        text = f"Records of what the study does not name any more, in no table: {', '.join(analysis.orphaned_records)}."
        blocks.append(Text(text=text))
    return blocks


def _making(analysis: Analysis) -> list[Block]:
    rows = [(name.replace("_", " "), ", ".join(values)) for name, values in analysis.made_with.items()]
    blocks: list[Block] = [
        Text(
            text=prose.MADE.format(
                seeds=", ".join(map(str, analysis.seeds)), sweep_seeds=", ".join(map(str, analysis.sweep_seeds))
            )
        )
    ]
    return [*blocks, grid("made-with", "What the runs ran on", "What|Values", rows)] if rows else blocks
