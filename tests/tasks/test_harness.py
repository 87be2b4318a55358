"""Tasks through lm-eval: its scores are those of the model, and chance stands beside them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from foldrank.hf.checkpoint import load
from foldrank.tasks.harness import evaluate_tasks
from foldrank.tasks.shipped import CHOICES, EXAMPLES, SHIPPED, write_tasks
from tests.called import Foldrank
from tests.small_runs import Run

pytestmark = pytest.mark.apart


def local_task(folder: Path) -> Path:
    rows = [
        {"context": f"bar{number}", "choices": [" kelt nun", " mide losh bar", *[" star"][: number % 2]]}
        for number in range(9)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps({**row, "label": 0}) + "\n" for row in rows))
    task: dict[str, Any] = {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    file = folder / "local.yaml"
    file.write_text(yaml.safe_dump(task))
    return file


@torch.no_grad()
def accuracy(run: Run, rows: list[dict[str, Any]]) -> float:
    """Of taking the choice that is likeliest after the context."""
    model, tokenizer = load(run.out / "folded")
    right = 0
    for row in rows:
        sums = []
        for choice in row["choices"]:
            before = tokenizer(row["context"], add_special_tokens=False).input_ids
            whole = tokenizer(row["context"] + choice, add_special_tokens=False).input_ids
            logs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(float(logs[at - 1, whole[at]]) for at in range(len(before), len(whole))))
        right += sums.index(max(sums)) == row["label"]
    return right / len(rows)


def test_a_local_task_gives_the_models_own_accuracy_beside_chance(
    finished_run: Run, tmp_path: Path, foldrank: Foldrank
) -> None:
    file = local_task(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    done = foldrank("evaluate", finished_run.out / "folded", "--tasks", file, "--json")
    (score,) = done.json["tasks"]
    assert (score["task"], score["metric"], score["examples"]) == ("local_choice", "acc", 9)
    assert score["value"] == pytest.approx(accuracy(finished_run, rows))
    assert score["chance"] == pytest.approx((5 / 2 + 4 / 3) / 9)  # of two choices, and of three
    assert score["standard_error"] is not None
    shown = foldrank("evaluate", finished_run.out / "folded", "--tasks", file, "--limit", 4)
    assert shown.code == 0
    assert "local_choice" in shown.stdout
    assert "chance" in shown.stdout


def test_the_tasks_that_ship_have_one_right_answer_of_four(finished_run: Run, tmp_path: Path) -> None:
    write_tasks(tmp_path)
    for name in SHIPPED:
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == EXAMPLES
        assert all(len(set(row["choices"])) == CHOICES and 0 <= row["label"] < CHOICES for row in rows)
        assert len({row["label"] for row in rows}) == CHOICES
    model, tokenizer = load(finished_run.out / "unfolded")
    with pytest.raises(ValueError, match="perhaps an answer is longer than the 32 positions"):
        evaluate_tasks(model, tokenizer, SHIPPED, limit=8)
    model.config.max_position_embeddings = 2048  # rotary, and lm-eval cuts by it
    scores = evaluate_tasks(model, tokenizer, SHIPPED, limit=8)
    assert {score.task for score in scores} == set(SHIPPED)
    assert all(score.chance == 1 / CHOICES and score.examples == 8 for score in scores)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "nowhere.yaml"), "nowhere.yaml does not exist"),
        (("--tasks", ","), "--tasks names none"),
        (("--tasks", "stdlib_summary", "--legacy"), "--legacy says nothing of --tasks"),
        (("--limit", "3"), "--limit says something of --tasks"),
    ],
)
def test_what_is_no_task_is_refused(
    finished_run: Run, foldrank: Foldrank, arguments: tuple[str, ...], message: str
) -> None:
    done = foldrank("evaluate", finished_run.out / "folded", *arguments)
    assert (done.code, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


def test_lm_evals_own_command_takes_the_checkpoint(finished_run: Run, tmp_path: Path) -> None:
    file, folded = local_task(tmp_path), finished_run.out / "folded"
    (ours,) = evaluate_tasks(*load(folded), [str(file)], limit=None, batch_size=4)
    program = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--include_path", str(tmp_path)]
    program += ["--model_args", f"pretrained={folded},trust_remote_code=True", "--device", "cpu"]
    done = subprocess.run(
        [*program, "--tasks", "local_choice", "--output_path", str(tmp_path / "out.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.rglob("out*.json")
    theirs = json.loads(written.read_text())["results"]["local_choice"]["acc,none"]
    assert theirs == pytest.approx(ours.value)
