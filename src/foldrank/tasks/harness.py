"""Tasks run by lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), with chance beside each score."""

import io
import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldrank.extras import needed
from foldrank.hf.foreign import foreign
from foldrank.tasks.shipped import SHIPPED, write_tasks


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    chance: float | None
    """What guessing gives, of accuracies in multiple choice."""
    examples: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    batch_size: int = 16,
    limit: int | None = None,
) -> list[Score]:
    """The scores of a model, as lm-eval computes them.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        names: of tasks that ship (`SHIPPED`), of lm-eval's own, which need a network, or YAML files of tasks.
        batch_size: requests at a time.
        limit: examples of a task at most, the first ones; None: all.

    Raises:
        ValueError: for a task that does not exist or cannot be read, and where lm-eval is not installed.
    """
    needed("lm_eval", "--tasks", extra="tasks")
    with tempfile.TemporaryDirectory() as shipped, _quiet():
        evaluator: Any = import_module("lm_eval.evaluator")
        manager_class: Any = import_module("lm_eval.tasks").TaskManager
        model_class: Any = import_module("lm_eval.models.huggingface").HFLM

        if set(names) & set(SHIPPED):
            write_tasks(Path(shipped))
        files = [Path(name) for name in names if name.endswith((".yaml", ".yml"))]
        if missing := [file for file in files if not file.is_file()]:
            raise ValueError(f"{missing[0]} does not exist: a task is a name, or a YAML file of lm-eval")
        others = [name for name in names if name not in SHIPPED and Path(name) not in files]
        with foreign("the tasks cannot be read"):
            folders = [shipped, *{str(file.resolve().parent) for file in files}]
            manager = manager_class(include_path=folders, include_defaults=bool(others))
            known = set(manager.all_tasks)
        if unknown := [name for name in others if name not in known]:
            raise ValueError(
                f"lm-eval has no task {unknown[0]!r}; foldrank ships {' and '.join(SHIPPED)}, and a YAML file is a task"
            )
        wanted: Any = [str(file.resolve()) if (file := Path(name)) in files else name for name in names]
        most = getattr(model.config, "max_position_embeddings", None)
        with foreign(f"lm-eval cannot run these tasks (perhaps an answer is longer than the {most} positions)"):
            language_model = model_class(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            results = evaluator.simple_evaluate(
                model=language_model, tasks=wanted, task_manager=manager, limit=limit, log_samples=True
            )
    return [score for task, values in results["results"].items() for score in _scores(task, values, results)]


def _scores(task: str, values: dict[str, Any], results: dict[str, Any]) -> list[Score]:
    samples = results["samples"].get(task, [])
    # In multiple choice each sample has a request for each of its choices.
    is_choice = results["configs"].get(task, {}).get("output_type") == "multiple_choice"
    choices = [len(sample["arguments"]) for sample in samples] if is_choice else []
    guess = math.fsum(1 / count for count in choices) / len(choices) if choices else None
    scores = []
    for name, value in values.items():
        metric, _, which = name.partition(",")
        if not which or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{which}")
        scores.append(
            Score(
                task=task,
                metric=metric if which == "none" else f"{metric} ({which})",
                value=float(value),
                standard_error=float(error) if isinstance(error, int | float) else None,
                chance=guess if metric in ("acc", "acc_norm") else None,
                examples=len(samples),
            )
        )
    return scores


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what lm-eval and datasets tell of their own doings; bars only where somebody looks."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
