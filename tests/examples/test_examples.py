"""Each example as a user runs it: a program of its own, warnings as errors."""

import importlib.util
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.small_runs import Run

pytestmark = pytest.mark.apart

FOLDER = Path(__file__).parents[2] / "examples"
NEEDS = {"with_lightning": "lightning"}
IGNORED = {"with_lightning": ["-W", "ignore:`isinstance(treespec, LeafSpec)`:FutureWarning"]}  # of lightning's own code


@pytest.mark.parametrize("name", ["bare_loop", "with_trainer", "with_accelerate", "with_lightning"])
def test_converts_learns_folds_and_checks_the_fold(name: str, tmp_path: Path) -> None:
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed: pip install 'foldrank[examples]'")
    program = [sys.executable, "-W", "error", *IGNORED.get(name, []), str(FOLDER / f"{name}.py")]
    done = subprocess.run(program, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"converted \d+ of \d+ linear layers", done.stdout)
    losses = re.search(r"loss (\S+) -> (\S+)", done.stdout)
    assert losses is not None
    assert float(losses[2]) < float(losses[1]) - 1.0
    assert re.search(r"folded \d+ low-rank layers", done.stdout)
    change = re.search(r"largest change of a logit: (\S+)", done.stdout)
    assert change is not None
    assert float(change[1]) <= 1e-5
    assert not list(tmp_path.iterdir())


def ask(port: int, server: subprocess.Popen[str], **asked: object) -> dict:
    """The answer of a server that may still be starting."""
    url, body = f"http://localhost:{port}/v1/completions", json.dumps(asked).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    until = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.URLError:
            assert server.poll() is None, server.stderr and server.stderr.read()
            assert time.monotonic() < until, "the server does not answer"
            time.sleep(0.2)


@pytest.mark.apart
@pytest.mark.parametrize("form", ["folded", "unfolded"])
def test_serves_completions(finished_run: Run, form: str) -> None:
    folder = str(finished_run.out / form)
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    program = [sys.executable, str(FOLDER / "serve.py"), folder, "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as server:
        try:
            answer = ask(port, server, model=folder, prompt="bar", max_tokens=5, temperature=0)
        finally:
            server.terminate()
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["choices"][0]["text"].strip()
