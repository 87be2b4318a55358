"""Every refusal that a user can meet, from the places that raise it, with when it is raised, by its docstring."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "foldrank"


def table_text(text: str) -> str:
    """Text in one line, for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("$", "\\$")


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A message that a user can meet."""

    message: str
    where: str
    about: str


TITLES = {
    "cli": "Any command",
    "console": "Output",
    "bounds": "Numbers out of bounds",
    "structured": "JSON and YAML",
    "extras": "Packages that are not installed",
    "hub": "The hub",
    "atomic": "Files and folders that are written",
    "core": "Layers and the fold",
    "surgery": "Models that become low-rank",
    "optim": "Optimizers",
    "hf": "Checkpoints and tokenizers",
    "data": "Text and its preparation",
    "recipes": "Recipes and their settings",
    "train": "Pre-training",
    "finetune": "Fine-tuning",
    "tasks": "Benchmarks of tasks",
    "export": "Export",
    "runtime": "Exported models",
    "runs": "Pages of runs",
    "report": "Reports",
    "compare": "Studies",
    "bench": "Benchmarks",
    "commands": "Arguments of commands",
}


def troubleshooting() -> str:
    """Every refusal, by part, from the places that raise it."""
    intro = (ROOT / "docs" / "_ext" / "troubleshooting.md").read_text()
    lines = [intro.rstrip(), ""]
    by_part: dict[str, list[Refusal]] = {}
    for file in sorted(SOURCE.rglob("*.py")):
        part = file.relative_to(SOURCE).with_suffix("").parts[0]
        by_part.setdefault(part, []).extend(refusals(file))
    if untitled := {part for part, found in by_part.items() if found} - set(TITLES):
        raise ValueError(f"refusals of {', '.join(sorted(untitled))} would be left out: give them a title here")
    for part, title in TITLES.items():
        found = {refusal.message: refusal for refusal in by_part.get(part, ())}
        if not found:
            continue
        lines += [f"## {title}", ""]
        for refusal in sorted(found.values(), key=lambda each: each.message.lower().lstrip("…'` ")):
            lines += [f"`{refusal.message}`", f": {refusal.about} *({refusal.where})*", ""]
    return "\n".join(lines)


def refusals(file: Path) -> Iterator[Refusal]:
    """The messages that a file raises as a user's mistake."""
    tree = ast.parse(file.read_text())
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for message in _problems(function):
            where = file.relative_to(SOURCE).with_suffix("").as_posix()
            yield Refusal(message.replace("`", "'"), where, table_text(_cause(function, "ValueError")))
        for node in ast.walk(function):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
                continue
            kind = node.exc.func.id if isinstance(node.exc.func, ast.Name) else ""
            if not re.fullmatch(r"(?!Assertion|Attribute|Not|Key|System)\w+Error", kind):
                continue
            message = _template(node.exc.args[0] if kind != "InterruptedRunError" else node.exc.args[-1])
            if len(re.sub(r"<[^>]*>|\W", "", message)) > 8:
                where = file.relative_to(SOURCE).with_suffix("").as_posix()
                yield Refusal(message.replace("`", "'"), where, table_text(_cause(function, kind)))


def _problems(function: ast.AST) -> Iterator[str]:
    """The messages that are collected, to be raised together: what is put into a list called `problems`."""
    for node in ast.walk(function):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        values = [node.value] if isinstance(node, ast.Assign | ast.AugAssign) and node.value else []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append":
            targets, values = [node.func.value], node.args
        if not any(isinstance(target, ast.Name) and target.id == "problems" for target in targets):
            continue
        parts = {part for value in values for text in ast.walk(value) if isinstance(text, ast.JoinedStr)
                 for part in ast.walk(text) if part is not text}  # fmt: skip
        for text in (text for value in values for text in ast.walk(value) if text not in parts):
            if isinstance(text, ast.JoinedStr) or (isinstance(text, ast.Constant) and isinstance(text.value, str)):
                message = _template(text)
                if len(re.findall(r"[A-Za-z]{2,}", re.sub(r"<[^>]*>", "", message))) >= 3:
                    yield message


def _template(node: ast.expr) -> str:
    """A message with what it fills in as <name>."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return " ".join("".join(map(_template, node.values)).split())
    if isinstance(node, ast.FormattedValue):
        names = [part.attr if isinstance(part, ast.Attribute) else part.id for part in ast.walk(node.value)
                 if isinstance(part, ast.Attribute | ast.Name)]  # fmt: skip
        return f"<{names[0].strip('_') if names else '…'}>"
    if isinstance(node, ast.BinOp):
        return _template(node.left) + _template(node.right)
    return "<…>"


def _cause(function: ast.FunctionDef | ast.AsyncFunctionDef, kind: str) -> str:
    """What the docstring says of when it is raised; else what the function does."""
    text = inspect.cleandoc(ast.get_docstring(function) or "")
    if found := re.search(rf"^ +{kind}: (.*?)(?=^ +\w+Error: |^\S|\Z)", text, re.DOTALL | re.MULTILINE):
        return f"Raised {' '.join(found[1].split())}"
    return text.partition("\n")[0] or "A value is out of range, or values do not go together."
