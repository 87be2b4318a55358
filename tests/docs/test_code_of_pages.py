"""Every piece of code that a page shows is run, and every command that it names is one."""

import argparse
import re
import shlex
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from torch import nn

from foldrank.cli import full_parser

from ..small_runs import Run

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "benchmarks" / "README.md"])
RUN_ELSEWHERE = {"any-model", "backbones", "architectures", "optimizers", "from-dense"}
"""By tests/core/test_docs.py and tests/hf/test_docs.py."""
RUN_HERE = {"serving", "budget", "start", "README"}


def code(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_no_page_shows_code_that_is_not_run() -> None:
    shown = {page.stem for page in PAGES if code(page)}
    assert shown <= RUN_ELSEWHERE | RUN_HERE
    assert not [page for page in PAGES if re.search(r"^```python +\w", page.read_text(), re.MULTILINE)]


@pytest.mark.parametrize("name", sorted(RUN_HERE))
def test_the_code_of_a_page_runs(name: str, finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run.out, tmp_path / "runs" / "demo")
    page = next(page for page in PAGES if page.stem == name and (name != "README" or page.parent == ROOT))
    for block in code(page):
        exec(compile(block, page.name, "exec"), {"model": nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))})


def commands(page: Path) -> Iterator[list[str]]:
    """The command lines of foldrank in the blocks of a page."""
    text = page.read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    for block in blocks:
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            found = re.match(r"\s*(?:\$ )?(?:torchrun .*?-m )?foldrank (.*)", line)
            if found:
                words = shlex.split(found[1], comments=True)
                stop = next((at for at, word in enumerate(words) if word in ("&&", "|", ">", "&", ";", "2>&1")), None)
                yield ["." if word.startswith("hf://") else word for word in words[:stop] if word != "..."]


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


@cache
def parser() -> argparse.ArgumentParser:
    return full_parser()


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 40


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[" ".join(words)[:60] for _, words in COMMANDS])
def test_a_command_of_a_page_is_one(page: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        parser().parse_args(words)
    except SystemExit:
        pytest.fail(f"{page.name}: foldrank {' '.join(words)}: {capsys.readouterr().err}")
