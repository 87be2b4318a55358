"""Examples that a small model learns."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

COLOURS = ("bar", "kelt", "losh", "mide")


def write(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def prompts(count: int = 40) -> list[dict[str, Any]]:
    return [{"prompt": f"{number} star", "completion": f" {COLOURS[number % 4]} nun."} for number in range(count)]


def chats(count: int = 40) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "system", "content": "min"},
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"].strip()},
            ]
        }
        for row in prompts(count)
    ]


def labelled(count: int = 60) -> list[dict[str, Any]]:
    return [{"text": f"{COLOURS[number % 2] * 3} {number}", "label": COLOURS[number % 2]} for number in range(count)]
