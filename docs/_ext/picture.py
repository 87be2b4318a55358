"""The picture of a run for the README: `python docs/_ext/picture.py runs/demo docs/_static/demo.svg`."""

import sys
from pathlib import Path

from foldrank.report.svg import svg
from foldrank.runs.charts import losses
from foldrank.runs.run import read_run

STYLE = """\
<style>
svg { --ink: #1c2024; --quiet: #5a626b; --line: #dfe2e6; --series-8: #737a82; --series-3: #0067a8;
  font-family: system-ui, sans-serif; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e7e9ec; --quiet: #a0a8b1; --line: #343a41; --series-8: #9aa2ab; --series-3: #5bb0f0; }
}
</style>
"""


def main(run: Path, file: Path) -> None:
    """Training and validation loss over steps, in the colours of the reader's screen."""
    chart = losses([("run", read_run(run))])
    assert chart is not None
    picture = svg(chart.views[0][1], "readme")
    begin = picture.index(">") + 1
    file.write_text(picture[:begin].replace("<svg", '<svg width="640"') + STYLE + picture[begin:] + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
