"""`foldrank report`: what a study shows, as a page and as Markdown."""

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command line."""
    parser.description = (
        "Write report.html (one file that needs no network) and report.md from a study's folder, finished or not: the "
        "methods' losses with intervals, paired differences, costs, curves (docs/report.md)."
    )
    parser.add_argument("study", type=Path, metavar="DIR", help="folder of a study, as foldrank compare makes it")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the report (default: the study's)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes both reports; returns the analysis from which they were made."""
    try:
        from foldrank.compare.report import report_html, report_markdown
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'foldrank[report]'") from error
    from foldrank.atomic import write_text
    from foldrank.compare.analysis import analyse_folder
    from foldrank.compare.headline import headline
    from foldrank.compare.summary import summary

    folder: Path = arguments.study
    analysis = analyse_folder(folder)
    out: Path = arguments.out or folder
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "report.html", report_html(analysis))
    write_text(out / "report.md", report_markdown(analysis))
    return {
        "html": str(out / "report.html"),
        "markdown": str(out / "report.md"),
        "headline": list(headline(analysis)),
        "summary": {title: list(sentences) for title, sentences in summary(analysis)},
        **analysis.to_dict(),
    }


def show(result: dict[str, Any]) -> None:
    """Says the answer, and where the reports are."""
    print(f"{result['title']}: {result['final_records_done']} of {result['final_records_expected']} final runs done")
    for sentence in result["headline"]:
        print(f"\n{sentence}")
    print(f"\n{result['html']}\n{result['markdown']}")
