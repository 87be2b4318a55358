"""Malformed calls, drawn from a fixed seed: exit 0 or 2, one line, no traceback, nothing left behind, no code run.

FUZZ_SECONDS bounds the time (30 in the suite) and FUZZ_SEED starts elsewhere; a failure names the call that made it.
"""

import contextlib
import gzip
import io
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foldrank.cli import main
from foldrank.finetune.settings import setting_help
from foldrank.recipes.schema import field_help

from .called import tree
from .small_runs import Run

SECONDS = float(os.environ.get("FUZZ_SECONDS", "30"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
LIMIT = 60
"""Seconds of one call, far above what any takes."""

NUMBERS = (
    "0",
    "-1",
    "1",
    "2",
    "7",
    "1.5",
    "-0.0",
    "1e-30",
    "1e30",
    "1e308",
    ".inf",
    ".nan",
    "9" * 26,
    "2000000000",
    "010",
)
SMALL_BENCH = ["--recipe", "tiny-cola-dlr", "--batch-size", "1", "--sequence-length", "8", "--vocabulary", "64"]
"""What of these numbers is a benchmark indeed must end in time."""

TEXTS = (
    *("", " ", "no", "null", "~", "true", "[]", "{}", "[1, [2, [3]]]", "{a: {b: c}}", "x" * 5000, "é\u202e\x1b[31m"),
    *(
        "[/x]",
        "[bold]",
        "../..",
        "/dev/null",
        "/proc/self/mem",
        "nowhere",
        "a:b",
        "1:30",
        "2023_11",
        "*x",
        "&a [*a]",
        "\ud800",
    ),
    *(
        "(([a-z_.0-9]+)+)+Z",
        "[",
        "(",
        "!!python/object/apply:os.system [touch marker]",
        "a: 1\na: 2",
        "-",
        "--",
        "%s",
        "\0",
    ),
)
JSONS: tuple[Any, ...] = (
    None,
    True,
    0,
    -5,
    3,
    16.5,
    10**9,
    4 * 10**9,
    10**26,
    1e308,
    "",
    "x",
    "ü",
    [],
    {},
    [1],
    {"a": 1},
    [[]],
)
"""Values in place of those of a JSON file."""

ARCHITECTURE = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "layer_types": ["full_attention"] * 2,
    "vocab_size": 99,
}
"""A config.json of which one field is damaged and some are missing."""

CODE = "import pathlib; pathlib.Path({marker!r}).touch()\n"


class Fuzzer:
    """Draws calls in a folder of its own."""

    def __init__(self, folder: Path, run: Run, corpus: Path, seed: int) -> None:
        self.draw = random.Random(seed)
        self.folder, self.run, self.corpus = folder, run, corpus
        self.marker = folder / "marker"
        self.kinds: tuple[Callable[[Path], list[str]], ...] = (
            *(self.settings, self.options, self.recipe, self.study, self.text, self.prepared),
            *(self.examples, self.exported),
            *(self.architecture, self.weights, self.json_of_a_checkpoint, self.truncated, self.tokenizer_to_prepare),
        )

    def value(self) -> str:
        return self.draw.choice(self.draw.choice((NUMBERS, TEXTS)))

    def settings(self, _: Path) -> list[str]:
        names = self.draw.sample(sorted(field_help()), self.draw.choice((1, 1, 2, 3)))
        options = [part for name in names for part in (f"--{name}", self.value())]
        return self.draw.choice((["plan", "demo"], ["pretrain", "demo", "--print_config"])) + options

    def options(self, sandbox: Path) -> list[str]:
        calls = (
            *(
                ["plan", self.value()],
                ["pretrain", str(self.run.recipe), "--out", self.value(), "--steps", self.value()],
            ),
            *(["info", self.value()], ["report", self.value()], ["bench", self.value()], [self.value()]),
            *(
                ["compare", self.value(), "--workers", self.value()],
                ["fold", self.value(), "--out", str(sandbox / "o")],
            ),
            *(["evaluate", str(self.run.out / "folded"), "--sequence-length", self.value(), "--data", self.value()],),
            *(["generate", str(self.run.out / "folded"), "--max-new-tokens", "3", "--prompt", self.value()],),
            *(["generate", str(self.run.out / "folded"), "--temperature", self.value(), "--prompt", "x"],),
            *(
                [
                    "bench",
                    "step",
                    *SMALL_BENCH,
                    "--rounds",
                    self.value(),
                    "--threads",
                    self.value(),
                    "--layers",
                    self.value(),
                ],
            ),
            *(
                ["prepare", self.value(), "--out", str(sandbox / "out")],
                ["suggest", f"--{self.draw.choice(('tokens', 'parameters', 'flops', 'mfu'))}", self.value()],
                ["suggest", "--tokens", "1e9", self.draw.choice(("--gpu", "--study", "--ranks")), self.value()],
                ["export", str(self.run.out / self.draw.choice(("folded", "unfolded"))), "--out", self.value()],
                ["factorize", str(self.run.out / "unfolded"), "--budget", self.value(), "--activation", self.value()],
                ["plan", "demo", "--model.config", self.value(), "--model.fields", self.value()],
                ["prepare", str(self.corpus), "--out", self.value()],
            ),
        )
        return self.draw.choice(calls)

    def recipe(self, sandbox: Path) -> list[str]:
        file = sandbox / self.draw.choice(("r.yaml", "r.YML"))
        file.write_bytes(self.damaged(self.run.recipe.read_bytes()))
        return ["plan", str(file)]

    def architecture(self, sandbox: Path) -> list[str]:
        config = {name: value for name, value in ARCHITECTURE.items() if self.draw.random() < 0.9}
        (sandbox / "config.json").write_text(json.dumps(config | {self.draw.choice([*ARCHITECTURE]): self.damage()}))
        return ["plan", "demo", "--model.config", str(sandbox), "--train.sequence_length", "16", "--low_rank.rank", "4"]

    def examples(self, sandbox: Path) -> list[str]:
        rows = [
            {"prompt": f"{number} star", "completion": " bar", "text": "bar", "label": number % 2}
            for number in range(30)
        ]
        for _ in range(self.draw.choice((0, 1, 3))):
            row = self.draw.choice(rows)
            row[self.draw.choice([*row])] = self.draw.choice(JSONS)
        lines = [json.dumps(row) for row in rows]
        if self.draw.random() < 0.3:
            lines[self.draw.randrange(30)] = self.draw.choice(("[1]", "{", "", "\ud800", "[" * 3000)).replace(
                "\ud800", "?"
            )
        (sandbox / "a.jsonl").write_text("\n".join(lines))
        call = [
            "finetune",
            str(self.run.out / "folded"),
            "--data",
            str(sandbox / "a.jsonl"),
            "--out",
            str(sandbox / "o"),
        ]
        call += ["--task", self.draw.choice(("language", "classification")), "--epochs", "0.2"]
        if self.draw.random() < 0.5:
            names = [name for name in setting_help() if name not in ("data", "epochs")]
            call += [f"--{self.draw.choice(names).replace('_', '-')}", self.value(), "--print_config"]
        return call

    def exported(self, sandbox: Path) -> list[str]:
        settings = {"key_value_heads": 2, "head_size": 16, "end_tokens": [0], "max_positions": None}
        settings[self.draw.choice([*settings])] = self.damage()  # pyright: ignore[reportArgumentType]
        content = {"runtime.json": json.dumps(settings), "tokenizer.json": "{}", "model.onnx": self.value()}
        for name in self.draw.sample([*content], self.draw.choice((1, 2, 3))):
            (sandbox / name).write_bytes(content[name].encode("utf-8", "surrogateescape"))
        return ["generate", str(sandbox), "--prompt", "bar"]

    def damage(self) -> Any:
        return self.draw.choice((None, "", -1, 0, 1.5, 7, 10**12, True, [], {}, [1, "a"], "nan", "../x"))

    def study(self, sandbox: Path) -> list[str]:
        import foldrank.recipes

        shipped = Path(foldrank.recipes.__file__).parent / "tiny.yaml"
        (sandbox / "study.yaml").write_bytes(self.damaged(shipped.read_bytes()))
        (sandbox / "taken").write_text("a file, so that nothing runs")
        return ["compare", str(sandbox / "study.yaml"), "--out", str(sandbox / "taken")]

    def damaged(self, content: bytes) -> bytes:
        lines = content.decode().splitlines()
        for _ in range(self.draw.choice((1, 1, 2, 4))):
            number = self.draw.randrange(len(lines))
            how = self.draw.randrange(5)
            if how == 0:
                lines.insert(number, lines[number])
            elif how == 1:
                lines[number] = lines[number].partition(":")[0] + ": " + self.value().replace("\ud800", "?")
            elif how == 2:
                lines[number] = lines[number][: self.draw.randrange(1 + len(lines[number]))]
            elif how == 3:
                lines.insert(number, self.value().replace("\ud800", "?"))
            else:
                lines[number] = "[" * self.draw.choice((3, 2000)) + lines[number]
        damaged = bytearray("\n".join(lines).encode())
        if damaged and self.draw.random() < 0.2:
            damaged[self.draw.randrange(len(damaged))] = self.draw.randrange(256)
        return bytes(damaged)

    def text(self, sandbox: Path) -> list[str]:
        source = sandbox / "text"
        source.mkdir()
        for number in range(self.draw.randrange(1, 6)):
            good = "".join(file.read_text() for file in sorted(self.corpus.rglob("*.txt"))[number : number + 9])
            rows = [json.dumps({"text": good, "n": self.draw.choice(JSONS)}) for _ in range(3)]
            content = self.draw.choice(
                (
                    *(good.encode(), good.encode("utf-16"), good.encode()[:5000] + b"\xff\xfe" + good.encode()),
                    *(
                        self.draw.randbytes(2000),
                        b"",
                        b"\0" * 100,
                        "\n".join(rows).encode(),
                        ("[" + ",".join(rows)).encode(),
                    ),
                    *(
                        gzip.compress(good.encode()),
                        gzip.compress(good.encode())[:-9],
                        b"[" * 3000,
                        b'"\\ud800"',
                        b"NaN\n",
                    ),
                )
            )
            ending = self.draw.choice(
                (".txt", ".TXT", ".json", ".JSONL", ".gz", ".txt.gz", ".parquet", ".zst", ".xz", "")
            )
            (source / f"f{number}{ending}").write_bytes(content)
        if self.draw.random() < 0.3:
            (source / "loop").symlink_to(self.draw.choice((source, source / "loop", sandbox / "nowhere")))
        if self.draw.random() < 0.5:
            return ["prepare", str(source), "--check"]
        return ["prepare", str(source), "--tokenizer", str(self.run.out / "folded"), "--out", str(sandbox / "out")]

    def prepared(self, sandbox: Path) -> list[str]:
        data = shutil.copytree(self.folder / "prepared", sandbox / "data")
        self.change_json(data / "manifest.json")
        return self.draw.choice(
            (
                ["prepare", str(data), "--verify"],
                [
                    "pretrain",
                    str(self.run.recipe),
                    "--data.source",
                    str(data),
                    "--out",
                    str(sandbox / "out"),
                    "--steps",
                    "1",
                ],
            )
        )

    def checkpoint(self, sandbox: Path) -> Path:
        part = self.draw.choice(("folded", "unfolded"))
        folder = shutil.copytree(self.run.out / part, sandbox / part)
        for file in folder.glob("*.py"):
            file.write_text(CODE.format(marker=str(self.marker)))
        if self.draw.random() < 0.3:
            (folder / "checksums.json").unlink()
        return folder

    def command_on(self, folder: Path, sandbox: Path) -> list[str]:
        accept = ["--accept-changes"] if self.draw.random() < 0.7 else []
        return self.draw.choice(
            (
                ["info", str(folder), *self.draw.choice(((), ("--verify",)))],
                ["generate", str(folder), "--prompt", "bar", "--max-new-tokens", "2", *accept],
                ["evaluate", str(folder), "--data", str(sorted(self.corpus.rglob("*.txt"))[0]), *accept],
                ["fold", str(folder), "--out", str(sandbox / "out"), *accept],
            )
        )

    def weights(self, sandbox: Path) -> list[str]:
        folder = self.checkpoint(sandbox)
        content = bytearray((folder / "model.safetensors").read_bytes())
        header = int.from_bytes(content[:8], "little")
        for _ in range(self.draw.choice((1, 1, 3))):
            place = self.draw.choice(
                (self.draw.randrange(8), self.draw.randrange(8, 8 + header), self.draw.randrange(len(content)))
            )
            content[place] ^= 1 << self.draw.randrange(8)
        (folder / "model.safetensors").write_bytes(content)
        return self.command_on(folder, sandbox)

    def truncated(self, sandbox: Path) -> list[str]:
        folder = self.checkpoint(sandbox)
        file = self.draw.choice(sorted(file for file in folder.iterdir() if file.is_file()))
        content = file.read_bytes()
        if self.draw.random() < 0.3:
            file.unlink()
        else:
            file.write_bytes(content[: self.draw.randrange(len(content))])
        return self.command_on(folder, sandbox)

    def json_of_a_checkpoint(self, sandbox: Path) -> list[str]:
        folder = self.checkpoint(sandbox)
        self.change_json(self.draw.choice(sorted(folder.glob("*.json"))))
        return self.command_on(folder, sandbox)

    def tokenizer_to_prepare(self, sandbox: Path) -> list[str]:
        folder = self.checkpoint(sandbox)
        self.change_json(self.draw.choice(sorted(folder.glob("token*.json"))))
        return ["prepare", str(self.corpus), "--tokenizer", str(folder), "--out", str(sandbox / "out")]

    def change_json(self, file: Path) -> None:
        """Another value somewhere in a JSON file, a field less or more, or something else in its place."""
        whole = json.loads(file.read_text())
        if self.draw.random() < 0.1:
            file.write_text(self.draw.choice(("null", "[]", "NaN", "[" * 3000, "", "{", json.dumps(whole)[:-20])))
            return
        part: Any = whole
        while True:
            names = list(part) if isinstance(part, dict) else list(range(len(part)))
            name = self.draw.choice(names)
            if isinstance(part[name], dict | list) and part[name] and self.draw.random() < 0.7:
                part = part[name]
                continue
            how = self.draw.random()
            if how < 0.15:
                del part[name]
            elif how < 0.3 and isinstance(part, dict):
                part["surplus"] = self.draw.choice(JSONS)
            else:
                part[name] = self.draw.choice(JSONS)
            break
        file.write_text(json.dumps(whole))


def call(arguments: list[str]) -> tuple[int, str, str]:
    stdout, stderr = io.StringIO(), io.StringIO()

    def late(*_: object) -> None:
        raise AssertionError(f"no end after {LIMIT} s: {arguments}")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = main(arguments)
    finally:
        signal.alarm(0)
    return code, stdout.getvalue(), stderr.getvalue()


PROGRESS = ("training the tokenizer", "tokenizing", "finding the place", "waiting for", "step ")
"""How lines of progress begin, which stand before the one that says what is wrong."""


def complaint(code: int, stdout: str, stderr: str, marker: Path, left: set[str]) -> str | None:
    lines = [line for line in stderr.splitlines() if not line.startswith(PROGRESS)]
    if code not in (0, 2):
        return f"exit code {code}"
    if "Traceback" in stderr + stdout:
        return "traceback"
    if marker.exists():
        return "code was run"
    if code == 2 and (stdout or len(lines) != 1 or len(lines[0]) > 300):
        return f"{len(lines)} lines, the longest of {max(map(len, lines), default=0)}, or something on standard output"
    return f"left {sorted(left)[:3]}" if code == 2 and left else None


@pytest.mark.usefixtures("usual_memory")
def test_malformed_calls(
    finished_run: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(["prepare", str(corpus), "--vocab-size", "320", "--out", str(tmp_path / "prepared")])[0] == 0
    fuzzer = Fuzzer(tmp_path, finished_run, corpus, SEED)
    sandbox = tmp_path / "sandbox"
    counts: Counter[str] = Counter()
    failures = []
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        kind = fuzzer.draw.choice(fuzzer.kinds)
        shutil.rmtree(sandbox, ignore_errors=True)
        sandbox.mkdir()
        monkeypatch.chdir(sandbox)
        arguments = kind(sandbox)
        before = tree(sandbox).keys()
        code, stdout, stderr = call(arguments)
        left = set(tree(sandbox).keys() - before)
        counts[f"{kind.__name__} {code}"] += 1
        if problem := complaint(code, stdout, stderr, fuzzer.marker, left):
            fuzzer.marker.unlink(missing_ok=True)
            failures.append(f"{problem}: {' '.join(arguments)[:300]!r}: {stderr[-400:]!r}")
    with capfd.disabled():
        print(f"\n{counts.total()} malformed calls: {dict(sorted(counts.items()))}")  # noqa: T201 - for long runs
    assert not failures, f"{len(failures)} of {counts.total()}:\n" + "\n".join(failures[:40])
