"""What all tests share: an offline process with caches of its own, a small corpus, and one finished run."""

import contextlib
import gc
import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from .called import foldrank
from .forked import start
from .small_runs import Run

__all__ = ["foldrank", "start"]

HOME = tempfile.mkdtemp(prefix="foldrank-tests-")
# Set here, and not in a fixture: huggingface_hub reads its own when it is imported. Subprocesses inherit all of them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=f"{HOME}/huggingface",
    FOLDRANK_CACHE=f"{HOME}/cache",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",  # or the tokenizers warn at each fork
)

WORDS = [first + last for first in ("ba", "ke", "lo", "mi", "nu", "sta") for last in ("r", "n", "lt", "sh", "de", "x")]

RECIPE = """\
base: demo
model: {hidden_size: 32, intermediate_size: 50, num_layers: 2, num_heads: 2}
low_rank: {rank: 7}
data: {source: CORPUS, vocab_size: 320, validation_fraction: 0.2}
train:
  {optimizer: adamw, learning_rate: 0.006, steps: 12, batch_size: 4, sequence_length: 32, eval_every: 5,
   eval_tokens: 500}
sample_prompt: bar
sample_tokens: 4
"""
"""The demo, with everything small. The rank divides no width, and an evaluation is shorter than the split."""

SLOWEST = (
    "compare/test_compare_command.py",
    "train/test_interruption.py",
    "train/test_run_folder.py",
    "train/test_fold_at_start.py",
    "train/test_optimizers.py",
    "hf/test_families.py",
    "bench/test_benchmarks.py",
    "core/test_transforms.py",
    "finetune/test_finetune.py",
    "test_fuzz.py",
    "compare/test_halving.py",
)
"""Files that begin first, so that no processor waits for another's last one (make test keeps the order)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.as_posix().endswith(SLOWEST))


def pytest_collection_finish() -> None:
    # Half a million objects of the libraries, which each full collection would go through again.
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # the sizes are tiny, and sums in one order are equal to the last bit


@pytest.fixture
def graphs_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled blocks run the operations of their graph as they are: a kernel takes four seconds to compile."""
    from torch import nn

    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: compile_(module, **{"backend": "aot_eager", **how}))


@pytest.fixture
def usual_memory() -> Iterator[None]:
    """An environment that says nothing of memory; what the test, or foldrank in it, sets there is gone afterwards."""
    with patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
            del os.environ[name]
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 text files of about 1 kB in two folders, the same in every session."""
    draw = random.Random(0)
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        lines = (" ".join(draw.choices(WORDS, k=8)) + ".\n" for _ in range(draw.randrange(20, 40)))
        file = folder / f"part{number % 2}" / f"{number:02}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"Text {number}\n" + "".join(lines))
    return folder


@pytest.fixture(scope="session")
def recipe_file(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that trains in a second or two."""
    file = tmp_path_factory.mktemp("recipe") / "small.yaml"
    file.write_text(RECIPE.replace("CORPUS", str(corpus)))
    return file


@pytest.fixture(scope="session")
def finished_run(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What the command line does and leaves behind."""
    from foldrank.cli import main

    out = tmp_path_factory.mktemp("runs") / "small"
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = main(["pretrain", str(recipe_file), "--out", str(out)])
    assert code == 0, stderr.getvalue()
    metrics = json.loads((out / "metrics.json").read_text())
    return Run(recipe=recipe_file, out=out, stdout=stdout.getvalue(), stderr=stderr.getvalue(), metrics=metrics)
