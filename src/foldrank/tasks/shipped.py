"""Two multiple-choice tasks out of the standard library of the running Python, as lm-eval reads tasks.

- `stdlib_summary`: which of four first lines of docstrings is that of this function.
- `stdlib_next_line`: which of four lines comes next in this function.

The wrong ones are those of other functions of the same task. A model that was pre-trained on the standard library has
seen the right ones, so the scores compare models that were trained on the same text, and say nothing beyond.
"""

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

from foldrank.data.stdlib_functions import ASK, Function, stdlib_functions
from foldrank.structured import to_yaml

SHIPPED = ("stdlib_next_line", "stdlib_summary")

CHOICES, EXAMPLES, MOST_CHARS = 4, 200, 500
"""Choices an example; examples a task; characters of a context."""


def write_tasks(folder: Path) -> None:
    """Writes both tasks into a folder: examples as JSON lines, and the YAML that lm-eval reads."""
    functions = [each for each in stdlib_functions() if len(each.source) <= MOST_CHARS]
    random.Random(0).shuffle(functions)
    for name, pairs in (("stdlib_next_line", _next_lines(functions)), ("stdlib_summary", _summaries(functions))):
        examples = folder / f"{name}.jsonl"
        examples.write_text("".join(json.dumps(row) + "\n" for row in _rows(list(pairs))), encoding="utf-8")
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(examples.resolve())}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "target_delimiter": "",
            "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm")],
        }
        (folder / f"{name}.yaml").write_text(to_yaml(task), encoding="utf-8")


def _summaries(functions: list[Function]) -> Iterator[tuple[str, str]]:
    return ((each.source + ASK, f" {each.summary}") for each in functions if each.summary)


def _next_lines(functions: list[Function]) -> Iterator[tuple[str, str]]:
    for each in functions:
        lines = each.source.splitlines()
        at = len(lines) // 2
        if lines[at].strip():
            yield "\n".join(lines[:at]) + "\n", lines[at]


def _rows(pairs: list[tuple[str, str]]) -> Iterator[Mapping[str, object]]:
    """Each context with its answer and three of others."""
    draw = random.Random(0)
    answers = sorted({answer for _, answer in pairs})
    for context, answer in pairs[:EXAMPLES]:
        wrong = draw.sample([other for other in answers if other != answer], CHOICES - 1)
        choices = draw.sample([answer, *wrong], CHOICES)
        yield {"context": context, "choices": choices, "label": choices.index(answer)}
