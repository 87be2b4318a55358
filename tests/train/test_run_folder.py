"""A run owns its folder and its data: nothing else is emptied, and no number is of another text."""

import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from foldrank.data.cache import cache_folder
from foldrank.recipes import load_recipe
from foldrank.train.checkpoints import run_of, step_of
from foldrank.train.metrics import RunMetrics
from foldrank.train.pretrain import pretrain
from foldrank.train.run_folder import RunFolder, find_run

from ..called import Foldrank, tree
from ..small_runs import Run


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of its own, with a cache of its own."""
    monkeypatch.setenv("FOLDRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(100)]
    for number in range(40):
        file = tmp_path / "text" / f"{number}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(" ".join(draw.choices(words, k=10)) for _ in range(20)))
    return tmp_path / "text"


@pytest.fixture
def settings(text: Path, recipe_file: Path) -> list[object]:
    few = ("--train.steps", 4, "--train.save_every", 2, "--train.eval_every", 4)
    return ["pretrain", recipe_file, "--data.source", text.name, *few]


def unfinished(out: Path) -> None:
    """A finished run as if it had been killed after its second step."""
    for name in ("metrics.json", "folded", "unfolded", "checkpoints/checkpoint-4"):
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()


def drop_half(text: Path) -> None:
    for number in range(0, 40, 2):
        (text / f"{number}.txt").unlink()


def refused(done: Any, *words: str) -> None:
    assert (done.code, done.stdout) == (2, ""), done.stderr
    # Before it there may be lines that tell how far a preparation is.
    assert all(word in done.stderr.splitlines()[-1] for word in words), done.stderr


def test_evaluate_reads_what_the_run_read_whatever_became_of_its_source(
    foldrank: Foldrank, settings: list[object], text: Path, tmp_path: Path
) -> None:
    loss = foldrank(*settings, "--out", "run", "--json").json["val_loss_folded"]
    drop_half(text)
    assert foldrank("evaluate", "run/folded", "--json").json["loss"] == loss
    os.chdir(tmp_path / "run" / "folded")  # wherever one stands, and however one names it
    assert foldrank("evaluate", ".", "--json").json["loss"] == loss
    assert foldrank("evaluate", "../checkpoints/checkpoint-4", "--json").code == 0
    os.chdir(tmp_path)
    shutil.rmtree(cache_folder() / "data")
    done = foldrank("evaluate", "run/folded")
    recorded = RunFolder(Path("run")).read_config().data
    assert recorded is not None
    assert recorded.text_sha256 is not None
    refused(done, "has changed since the run was trained: its sha256 was", recorded.text_sha256[:12])


def test_evaluate_prepares_the_same_text_again(foldrank: Foldrank, settings: list[object]) -> None:
    loss = foldrank(*settings, "--out", "run", "--json").json["val_loss_folded"]
    shutil.rmtree(cache_folder() / "data")
    assert foldrank("evaluate", "run/folded", "--json").json["loss"] == loss


def test_resume_goes_on_with_the_text_of_the_run_or_not_at_all(
    foldrank: Foldrank, settings: list[object], text: Path
) -> None:
    whole = foldrank(*settings, "--out", "whole", "--json").json
    for out in ("there", "gone"):
        assert foldrank(*settings, "--out", out, "--json").code == 0
        unfinished(Path(out))
    drop_half(text)
    resumed = foldrank(*settings, "--out", "there", "--resume", "--json").json
    assert resumed["resumed_at_step"] == 2
    assert (resumed["val_loss"], resumed["text_sha256"]) == (whole["val_loss"], whole["text_sha256"])
    shutil.rmtree(cache_folder() / "data")
    before = tree(Path("gone"))
    refused(foldrank(*settings, "--out", "gone", "--resume"), "has changed since the run was trained")
    assert tree(Path("gone")) == before


def test_prepared_data_made_anew_with_another_tokenizer_is_noticed(
    foldrank: Foldrank, settings: list[object], text: Path
) -> None:
    prepare = ["prepare", text, "--validation-fraction", 0.2, "--out", "data"]
    assert foldrank(*prepare, "--vocab-size", 350).code == 0
    run = [*settings, "--data.source", "data", "--data.vocab_size", 4096, "--out", "run"]
    assert foldrank(*run).code == 0
    shutil.rmtree("data")
    assert foldrank(*prepare, "--vocab-size", 300).code == 0
    refused(foldrank("evaluate", "run/folded"), "the tokenizer has changed since the run was trained")
    unfinished(Path("run"))
    refused(foldrank(*run, "--resume"), "the tokenizer has changed since the run was trained")


def test_a_checkpoint_is_known_by_what_is_in_it(foldrank: Foldrank, settings: list[object]) -> None:
    whole = foldrank(*settings, "--out", "whole", "--json").json
    for out, seed in (("run", 0), ("other", 1)):
        assert foldrank(*settings, "--out", out, "--seed", seed).code == 0
        unfinished(Path(out))
    latest = Path("latest")
    shutil.copytree("run/checkpoints/checkpoint-2", latest)
    assert step_of(latest) == 2
    assert run_of(latest) == RunFolder(Path("run")).read_config().id
    stranger = Path("other/checkpoints/checkpoint-2")
    refused(foldrank(*settings, "--out", "run", "--resume", stranger), f"{stranger} is a checkpoint of another run")
    resumed = foldrank(*settings, "--out", "run", "--resume", latest, "--json").json
    assert (resumed["resumed_at_step"], resumed["val_loss"]) == (2, whole["val_loss"])


@pytest.mark.parametrize("content", ["lr: 0.1\n", "run: yes\n", "run: {seed: 3}\n", "- a list\n", "{", ""])
def test_a_folder_that_is_no_run_is_never_emptied(foldrank: Foldrank, settings: list[object], content: str) -> None:
    project = Path("project")
    (project / "src").mkdir(parents=True)
    (project / "config.yaml").write_text(content)
    (project / "src" / "train.py").write_text("mine")
    before = tree(project)
    for more in ([], ["--overwrite"]):
        refused(foldrank(*settings, "--out", project, *more), "project holds files that are no run")
    refused(foldrank(*settings, "--out", project, "--resume"), "project holds no run to go on with")
    assert tree(project) == before


def test_overwrite_never_takes_runs_that_lie_below(foldrank: Foldrank, settings: list[object]) -> None:
    assert foldrank(*settings, "--out", "run").code == 0
    for below in ("again/config.yaml", "tuned/finetune.yaml"):
        file = Path("run", below)
        file.parent.mkdir()
        file.write_bytes(Path("run/config.yaml").read_bytes())
        before = tree(Path("run"))
        refused(foldrank(*settings, "--out", "run", "--overwrite"), "has another run below it", str(file.parent))
        assert tree(Path("run")) == before
        shutil.rmtree(file.parent)


def test_links_and_the_current_folder_can_be_a_run_s(foldrank: Foldrank, settings: list[object], text: Path) -> None:
    settings[settings.index("--data.source") + 1] = text
    Path("target").mkdir()
    Path("link").symlink_to("target")
    Path("dangling").symlink_to("made")
    Path("itself").symlink_to("itself")
    for out in ("link", "dangling"):
        assert foldrank(*settings, "--out", out).code == 0
        assert Path(out).is_symlink()
    assert {path.name for path in Path("target").iterdir()} == {path.name for path in Path("made").iterdir()}
    refused(foldrank(*settings, "--out", "itself"), "itself")
    Path("here").mkdir()
    os.chdir("here")
    inode = Path().stat().st_ino
    for more in ([], ["--overwrite", "--seed", 1]):
        assert foldrank(*settings, "--out", ".", *more).code == 0
    assert Path().stat().st_ino == inode
    assert RunMetrics.read(Path("metrics.json")).seed == 1


def test_a_run_that_has_begun_holds_its_folder(foldrank: Foldrank, settings: list[object]) -> None:
    with RunFolder(Path("run")).claimed():
        refused(foldrank(*settings, "--out", "run"), "another run has begun in run")
        assert not Path("run").exists()
    assert foldrank(*settings, "--out", "run").code == 0


def test_in_a_thread_it_trains_and_leaves_the_process_as_it_was(recipe_file: Path, text: Path) -> None:
    recipe = load_recipe(str(recipe_file), {"train.steps": 2, "data.source": str(text)})
    before, losses = dict(os.environ), []
    thread = threading.Thread(target=lambda: losses.append(pretrain(recipe, Path("run"), quiet=True).val_loss))
    thread.start()
    thread.join()
    assert len(losses) == 1
    assert dict(os.environ) == before


def test_the_log_is_the_same_whether_somebody_watches(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(recipe_file), {"train.steps": 60, "train.eval_every": 60, "train.max_grad_norm": 1e6})
    logs = []
    for quiet in (False, True):
        pretrain(recipe, tmp_path / str(quiet), quiet=quiet)
        lines = map(json.loads, (tmp_path / str(quiet) / "log.jsonl").read_text().splitlines())
        logs.append(
            [
                {key: value for key, value in line.items() if "runtime" not in key and "usual" not in str(value)}
                for line in lines
                if "text" not in line  # and no note that steps are slower than usual, which the machine may be
            ]
        )
    assert [line.keys() for line in logs[0]] == [line.keys() for line in logs[1]]


def test_damaged_lines_of_the_log_stop_nothing(foldrank: Foldrank, settings: list[object]) -> None:
    assert foldrank(*settings, "--out", "run").code == 0
    unfinished(Path("run"))
    with Path("run/log.jsonl").open("ab") as log:
        log.writelines([b"\0\0\0\0\n", b"{\n", b'{"no": 1}\n', b"[]\n", b"\xff\xfe\n", b'{"step": 9'])
    assert foldrank(*settings, "--out", "run", "--resume").code == 0
    entries = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4]


def test_a_run_of_the_version_before_is_evaluated_if_its_text_is_the_same(
    foldrank: Foldrank, settings: list[object], text: Path
) -> None:
    loss = foldrank(*settings, "--out", "run", "--json").json["val_loss_folded"]
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    config["run"] = {"schema": 1, "recipe": "small", "versions": {}, "commit": None}
    config["train"]["control"] = config["train"].pop("ablation")
    config["low_rank"]["options"] = config["low_rank"].pop("extra_config")
    Path("run/config.yaml").write_text(yaml.safe_dump(config))
    assert foldrank("evaluate", "run/folded", "--json").json["loss"] == loss
    drop_half(text)
    refused(foldrank("evaluate", "run/folded"), "has changed since the run was trained")


def test_a_stream_s_run_keeps_the_text_that_it_is_evaluated_on(
    foldrank: Foldrank, settings: list[object], finished_run: Run, text: Path
) -> None:
    AutoTokenizer.from_pretrained(finished_run.out / "unfolded").save_pretrained("tokenizer")
    streamed = [*settings, "--data.stream", "true", "--data.tokenizer", "tokenizer"]
    loss = foldrank(*streamed, "--out", "run", "--json").json["val_loss_folded"]
    shutil.copytree("run", "stopped")
    unfinished(Path("stopped"))
    assert foldrank(*streamed, "--out", "stopped", "--resume", "--json").json["val_loss_folded"] == loss
    unfinished(Path("stopped"))
    drop_half(text)
    refused(foldrank(*streamed, "--out", "stopped", "--resume"), "the text has changed since the run was trained")
    shutil.rmtree(text)
    shutil.rmtree("tokenizer")
    assert foldrank("evaluate", "run/folded", "--json").json["loss"] == loss


def test_where_a_checkpoint_s_run_is_looked_for(finished_run: Run, tmp_path: Path) -> None:
    for part in ("", "folded", "checkpoints/checkpoint-12"):
        found = find_run(finished_run.out / part)
        assert found is not None
        assert found.path == finished_run.out.resolve()
    assert find_run(tmp_path) is None


Damage = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda values: values.pop("val_loss"), "val_loss: Field required"),
        (lambda values: values.update(steps="many"), "steps: Input should be a valid integer"),
        (lambda values: values.update(history=[{"step": 1}]), r"history\.0\.tokens: Field required"),
    ],
)
def test_metrics_of_the_wrong_kind_are_one_line(
    finished_run: Run, tmp_path: Path, damage: Damage, complaint: str
) -> None:
    values = dict(finished_run.metrics)
    damage(values)
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"metrics\.json is damaged: .*{complaint}"):
        RunMetrics.read(file)


def test_metrics_are_strict_json_and_what_an_old_file_lacks_takes_its_default(
    finished_run: Run, tmp_path: Path
) -> None:
    values = {name: value for name, value in finished_run.metrics.items() if name != "tokenizer_sha256"}
    metrics = RunMetrics.from_dict({**values, "val_perplexity": float("inf"), "of_a_later_version": 1})
    assert metrics.tokenizer_sha256 is None
    metrics.write(tmp_path / "metrics.json")
    written = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert written["val_perplexity"] is None
    assert RunMetrics.read(tmp_path / "metrics.json").val_loss == finished_run.metrics["val_loss"]
