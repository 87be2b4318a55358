"""`foldrank report`: what a study shows, as a page and as Markdown; what runs show, as a page."""

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command line."""
    parser.description = (
        "Write report.html, one file that needs no network. Of a study's folder, finished or not: the methods' losses "
        "with intervals, paired differences, costs, curves, and the same as report.md (docs/report.md). Of one run's "
        "folder or of several, laid over each other: losses, rates, speed and memory while they trained, the fold."
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="DIR", help="folder of a study, or of runs, finished or not"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the report (default: that of the study or run; of several "
        "runs the present one)"
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes the report; returns what it was made from."""
    from foldrank.runs.run import is_study

    folders: list[Path] = arguments.folders
    studies = [folder for folder in folders if is_study(folder)]
    if studies and len(folders) > 1:
        raise ValueError(f"{studies[0]} is a study: it is reported alone, and runs can be laid over each other")
    out: Path = arguments.out or (folders[0] if len(folders) == 1 else Path())
    if studies:
        return _study(studies[0], out)
    return _runs(folders, out)


def _runs(folders: list[Path], out: Path) -> dict[str, Any]:
    from foldrank.runs.page import PAGE, in_short, write_page

    out.mkdir(parents=True, exist_ok=True)
    runs = write_page(folders, out / PAGE)
    return {
        "html": str(out / PAGE),
        "runs": [
            {
                "path": str(run.path),
                "name": run.name,
                "kind": run.kind,
                "state": run.state,
                "step": run.log.step,
                "steps": run.steps,
                "in_short": in_short(run.name, run),
            }
            for run in runs
        ],
    }


def _study(folder: Path, out: Path) -> dict[str, Any]:
    try:
        from foldrank.compare.report import report_html, report_markdown
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'foldrank[report]'") from error
    from foldrank.atomic import write_text
    from foldrank.compare.analysis import analyse_folder
    from foldrank.compare.headline import headline
    from foldrank.compare.summary import summary

    analysis = analyse_folder(folder)
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
    if "runs" in result:
        for run in result["runs"]:
            print(run["in_short"])
        print(f"\n{result['html']}")
        return
    print(f"{result['title']}: {result['final_records_done']} of {result['final_records_expected']} final runs done")
    for sentence in result["headline"]:
        print(f"\n{sentence}")
    print(f"\n{result['html']}\n{result['markdown']}")
