"""Export to ONNX, and the runtime without torch: equal to eager, in batches, in pieces, and alone in an environment."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foldrank import LowRankConfig, fold_
from foldrank.cli import main
from foldrank.export.onnx import export_onnx
from foldrank.hf import LowRankLlamaForCausalLM
from foldrank.hf.checkpoint import load
from foldrank.runtime import Model, Sampling
from foldrank.runtime.sampling import next_tokens
from tests.called import Foldrank
from tests.hf.models import config
from tests.small_runs import Run

pytestmark = pytest.mark.apart

GREEDY = Sampling(temperature=0)
STARTS, ENDS = ("bar", "kelt star", "mide nun losh", "Text 1\n"), ("b", "star", "nun", "x", "losh mide")
PROMPTS = [f"{first} {second}" for first in STARTS for second in ENDS]


@pytest.fixture(scope="module")
def exported(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    model, tokenizer = load(finished_run.out / "folded")
    root = tmp_path_factory.mktemp("exported")
    export_onnx(model, tokenizer, root / "int8", precision="int8")
    for name, form in (("float32", "onnx"), ("openvino", "openvino")):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            command = ("export", finished_run.out / "folded", "--format", form, "--out", root / name, "--json")
            assert main([str(part) for part in command]) == 0
        (root / f"{name}.json").write_text(printed.getvalue())
    return {name: root / name for name in ("float32", "int8", "openvino")}


def eager(folder: Path, prompt: str, count: int) -> str:
    model, tokenizer = load(folder)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    ids: Any = model.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=tokenizer.pad_token_id)  # pyright: ignore
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("form", ["float32", "openvino"])
def test_logits_and_greedy_texts_are_those_of_eager(finished_run: Run, exported: dict[str, Path], form: str) -> None:
    model, _ = load(finished_run.out / "folded")
    runtime = Model(exported[form])
    ids = torch.randint(320, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(runtime.logits(ids.numpy())), model(input_ids=ids).logits, rtol=1e-5, atol=1e-5
        )
    for prompt in PROMPTS:
        text = runtime.generate(prompt, max_new_tokens=20, sampling=GREEDY)[0]
        assert text == eager(finished_run.out / "folded", prompt, 20)
        assert "".join(runtime.stream(prompt, max_new_tokens=20, sampling=GREEDY)) == text


@pytest.mark.parametrize("form", ["float32", "openvino"])
def test_a_batch_of_prompts_of_other_lengths_gives_what_each_gives_alone(exported: dict[str, Path], form: str) -> None:
    runtime = Model(exported[form])
    alone = [runtime.generate(prompt, max_new_tokens=15, sampling=GREEDY)[0] for prompt in PROMPTS]
    assert runtime.generate(PROMPTS, max_new_tokens=15, sampling=GREEDY) == alone


def test_int8_is_a_quarter_and_close(finished_run: Run, exported: dict[str, Path], foldrank: Foldrank) -> None:
    # Of a model as small as this one the graph is most of the file: the weights are compared.
    sizes = {name: (exported[name] / "model.onnx.data").stat().st_size for name in ("float32", "int8")}
    assert sizes["int8"] <= 0.3 * sizes["float32"]
    assert (exported["int8"] / "model.onnx.data").stat().st_mode == (exported["int8"] / "model.onnx").stat().st_mode
    source = Path(
        json.loads(foldrank("pretrain", finished_run.recipe, "--print_config", "--json").stdout)["config"]["data"][
            "source"
        ]
    )
    results = {
        name: foldrank("evaluate", folder, "--data", source, "--sequence-length", 32, "--json").json
        for name, folder in {**exported, "torch": finished_run.out / "folded"}.items()
    }
    assert results["float32"]["loss"] == pytest.approx(results["torch"]["loss"], rel=1e-6)
    assert results["int8"]["loss"] == pytest.approx(results["torch"]["loss"], rel=0.02)


def test_texts_to_stop_at_end_a_continuation_and_are_not_shown(exported: dict[str, Path]) -> None:
    runtime = Model(exported["float32"])
    text = runtime.generate("bar", max_new_tokens=30, sampling=GREEDY)[0]
    stop = text[9:12]
    expected = text[: text.index(stop)]
    assert runtime.generate("bar", max_new_tokens=30, sampling=GREEDY, stop=[stop])[0] == expected
    pieces = list(runtime.stream("bar", max_new_tokens=30, sampling=GREEDY, stop=["nowhere", stop]))
    assert "".join(pieces) == expected
    unended = list(runtime.stream("bar", max_new_tokens=30, sampling=GREEDY, stop=["nowhere"]))
    assert "".join(unended) == text
    assert len(unended) > 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": ["bar", ""]}, "the prompt '' has no tokens"),
        ({"prompts": "a\udcff"}, "half a character"),
        ({"prompts": "bar", "max_new_tokens": 0}, "max_new_tokens must be at least 1 and seed 0, got 0 and 0"),
        ({"prompts": "bar", "seed": -1}, "max_new_tokens must be at least 1 and seed 0, got 100 and -1"),
        ({"prompts": "bar", "stop": ["a", ""]}, "a text to stop at is empty"),
    ],
)
def test_what_cannot_be_continued_is_refused(exported: dict[str, Path], asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model(exported["float32"]).generate(**asked)


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_threads_that_are_not_there_are_refused(exported: dict[str, Path], threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads must lie between 1 and {os.cpu_count()}"):
        Model(exported["float32"], threads=threads)


def test_the_runtime_says_in_one_line_what_is_wrong_and_prints_nothing_else(exported: dict[str, Path]) -> None:
    def call(*arguments: object, stdout: Any = subprocess.PIPE) -> tuple[int, str | None, str]:
        command = [sys.executable, "-m", "foldrank.runtime", str(exported["float32"]), "--max-new-tokens", "5"]
        command += ["--prompt", *map(str, arguments)]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    told = "foldrank.runtime: max_new_tokens must be at least 1 and seed 0, got 5 and -1\n"
    assert call("bar", "--seed", -1) == (2, "", told)
    assert call("a\udcff")[:2] == (2, "")
    with open("/dev/full", "w") as full:
        assert call("bar", stdout=full) == (2, None, "foldrank.runtime: [Errno 28] No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    assert call("bar", stdout=writer) == (141, None, "")
    os.close(writer)


def test_a_text_longer_than_the_trained_ones_is_said(exported: dict[str, Path], foldrank: Foldrank) -> None:
    trained = Model(exported["float32"]).settings["trained_length"]
    long = foldrank("generate", exported["float32"], "--prompt", "bar", "--max-new-tokens", trained)
    assert f"more than the {trained} that this model was made for" in long.stderr
    short = foldrank("generate", exported["float32"], "--prompt", "bar", "--max-new-tokens", 2)
    assert (short.code, short.stderr) == (0, "")


def test_an_end_token_ends_it(exported: dict[str, Path]) -> None:
    runtime = Model(exported["float32"])
    assert runtime.settings["end_tokens"] == [0]
    runtime.ends = frozenset(range(320))
    assert runtime.generate(["bar", "kelt"]) == ["", ""]
    assert list(runtime.stream("bar")) == []


def test_sampling_draws_by_the_probabilities() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    random = np.random.default_rng(0)

    def shares(sampling: Sampling) -> list[float]:
        drawn = [int(next_tokens(logits, sampling, random)[0]) for _ in range(4000)]
        return [drawn.count(token) / 4000 for token in range(4)]

    assert shares(Sampling(temperature=1, top_k=None)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(Sampling(temperature=1, top_k=2)) == pytest.approx([5 / 8, 3 / 8, 0, 0], abs=0.03)
    assert shares(Sampling(temperature=1, top_p=0.6)) == pytest.approx([5 / 8, 3 / 8, 0, 0], abs=0.03)
    squares = [0.25, 0.09, 0.0225, 0.0025]
    assert shares(Sampling(temperature=0.5)) == pytest.approx([share / sum(squares) for share in squares], abs=0.03)
    assert shares(GREEDY) == [1, 0, 0, 0]
    with pytest.raises(ValueError, match=r"temperature must be .*; top_k must be .*; top_p must lie"):
        Sampling(temperature=-1, top_k=0, top_p=0)


def test_the_command_says_what_it_wrote_and_others_take_it(
    finished_run: Run, exported: dict[str, Path], tmp_path: Path, foldrank: Foldrank
) -> None:
    folded, out = finished_run.out / "folded", exported["float32"]
    done = json.loads(out.with_suffix(".json").read_text())
    assert done["largest_change_of_a_logit"] < 1e-4
    assert done["bytes"] == sum(file.stat().st_size for file in out.glob("model.onnx*"))
    again = foldrank("generate", out, "--prompt", "bar", "--temperature", 0, "--max-new-tokens", 9, "--json")
    assert again.json["text"] == "bar" + eager(folded, "bar", 9)
    for arguments, message in (
        ((folded, "--format", "onnx", "--out", out), "exists: choose another folder"),
        (
            (finished_run.out / "unfolded", "--format", "onnx", "--out", tmp_path / "b"),
            "is unfolded: export takes a folded",
        ),
        ((folded, "--precision", "int8", "--out", tmp_path / "b"), "--precision says something of --format onnx"),
    ):
        refused = foldrank("export", *arguments)
        assert (refused.code, refused.stderr.count("\n")) == (2, 1)
        assert message in refused.stderr
    assert not (tmp_path / "b").exists()
    for command in (("evaluate", out), ("generate", out, "--prompt", "bar")):
        refused = foldrank(*command, "--device", "cuda")
        assert refused.code == 2
        assert "--device is cuda, and an exported model runs on the CPU" in refused.stderr


def test_a_graph_for_openvino_is_of_float32(finished_run: Run, exported: dict[str, Path], foldrank: Foldrank) -> None:
    folder = exported["openvino"]
    done = json.loads(folder.with_suffix(".json").read_text())
    assert done["largest_change_of_a_logit"] < 1e-4
    assert done["bytes"] > 4 * done["parameters_low_rank"]
    assert {"model.xml", "model.bin", "runtime.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    again = foldrank("generate", folder, "--prompt", "bar", "--temperature", 0, "--max-new-tokens", 9, "--json")
    assert again.json["text"] == "bar" + eager(finished_run.out / "folded", "bar", 9)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "runtime.json", "model.onnx.data", "model.xml"])
@pytest.mark.parametrize("damage", ["missing", "cut", "rubbish"])
def test_a_damaged_folder_is_refused_in_one_line(
    exported: dict[str, Path], tmp_path: Path, foldrank: Foldrank, name: str, damage: str
) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in exported["openvino" if name == "model.xml" else "float32"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage != "missing":
        (folder / name).write_bytes(content[: len(content) // 2] if damage == "cut" else b"rubbish" * 99)
    done = foldrank("generate", folder, "--prompt", "bar")
    assert (done.code, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "damaged" in done.stderr or "it has no" in done.stderr or "no checkpoint" in done.stderr


def test_other_families_and_backbones_export(finished_run: Run, tmp_path: Path) -> None:
    """GPT-2 learns its positions, CR-Net has blocks of its own."""
    from tests.hf.test_heads import language_model

    _, tokenizer = load(finished_run.out / "folded")
    for name in ("gpt2", "crnet"):
        model = language_model(name).eval()
        fold_(model)
        export_onnx(model, tokenizer, tmp_path / name)
        runtime = Model(tmp_path / name)
        ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = model(input_ids=ids).logits
        torch.testing.assert_close(torch.from_numpy(runtime.logits(ids.numpy())), expected, rtol=1e-4, atol=1e-5)
        assert (runtime.max_positions is None) == (name != "gpt2")


def test_what_cannot_be_exported_is_refused(finished_run: Run, tmp_path: Path) -> None:
    unfolded, tokenizer = load(finished_run.out / "unfolded")
    with pytest.raises(ValueError, match="the model is unfolded: fold it first"):
        export_onnx(unfolded, tokenizer, tmp_path / "out")
    windowed: Any = LowRankLlamaForCausalLM(config(LowRankConfig(rank=3)))
    windowed.config.sliding_window = 8
    with pytest.raises(ValueError, match="has a sliding window"):
        export_onnx(windowed, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_runtime_needs_nothing_but_its_three_packages(exported: dict[str, Path], tmp_path: Path) -> None:
    """In an isolated interpreter that finds those packages alone, and a wheel's files of foldrank."""
    root = Path(__file__).parents[2]
    wheels = tmp_path / "wheels"
    built = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            wheels,
            root / "packaging" / "runtime",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.glob("foldrank_runtime-*.whl")
    environment = tmp_path / "environment"
    for package in ("numpy", "numpy.libs", "tokenizers", "onnxruntime"):
        source = Path(np.__file__).parents[1] / package
        if source.exists():
            (environment / package).parent.mkdir(parents=True, exist_ok=True)
            (environment / package).symlink_to(source)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", environment, wheel],
        check=True,
        capture_output=True,
    )
    assert not (environment / "foldrank" / "__init__.py").exists()
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    program = Path(__file__).with_name("without_torch.py")
    start = (
        "import sys, runpy; sys.path[:] = [path for path in sys.path if 'site-packages' not in path]; "
        f"sys.path.append({str(environment)!r}); runpy.run_path({str(program)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            start,
            exported["float32"],
            tmp_path / "prompts.json",
            tmp_path / "facts.json",
        ],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "facts.json").read_text())
    runtime = Model(exported["float32"])
    expected = [runtime.generate(prompt, max_new_tokens=12, sampling=GREEDY)[0] for prompt in PROMPTS]
    assert facts["alone"] == facts["batch"] == facts["streamed"] == expected
    assert facts["modules"] == []
    assert facts["seconds"] < 5  # a second on an idle machine (docs/export.md); here beside other tests
