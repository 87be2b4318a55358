"""The reference, written from the code before each build of the site: API, settings, recipes, files, refusals, results.

Each page is a function below. They are written to docs/reference, which git leaves out.
"""

import ast
import dataclasses
import inspect
import itertools
import logging
import os
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from refusals import table_text as _text
from refusals import troubleshooting
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "foldrank"
PACKAGES = {
    "foldrank": "What most need: layers, surgery, the residual, the fold. It imports torch alone.",
    "foldrank.core": "What else the core has.",
    "foldrank.surgery": "What else surgery has.",
    "foldrank.optim": "Optimizers for factors, for any loop.",
    "foldrank.hf": "Classes of transformers with low-rank layers. Importing it registers them.",
    "foldrank.recipes": "What is asked of a run.",
    "foldrank.runtime": "Runs exported models without torch.",
}
FUNCTIONS = {
    "foldrank.train.pretrain": ["pretrain"],
    "foldrank.finetune.finetune": ["finetune"],
    "foldrank.hf.checkpoint": ["load", "inspect"],
}
"""What commands call, for who calls it from Python."""


def setup(app: Sphinx) -> dict[str, Any]:
    """Hooks into the build."""
    logging.getLogger("foldrank").setLevel(logging.WARNING)  # it says what it converts while recipes are counted
    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir) / "reference"))
    app.connect("html-page-context", _with_levels, priority=1000)
    app.add_html_math_renderer("mathml", inline_renderers=(_math, None), block_renderers=(_math, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _with_levels(_app: Sphinx, _page: str, _template: str, context: dict[str, Any], _tree: object) -> None:
    """Captions of a table of contents are headings, and say here of which level."""
    for part in ("body", "furo_navigation_tree"):
        if part in context:
            context[part] = context[part].replace('role="heading">', 'role="heading" aria-level="2">')


def _math(translator: Any, node: Any) -> None:
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    translator.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def write_pages(folder: Path) -> None:
    """Writes each page that is not as it should be, so that an unchanged one is not read again."""
    folder.mkdir(exist_ok=True)
    pages = {
        "api": api(),
        "commands": commands(),
        "settings": settings(),
        "recipes": recipes(),
        "files": files(),
        "results": results(),
        "troubleshooting": troubleshooting(),
        "changelog": included("CHANGELOG.md"),
        "experiments": included("EXPERIMENTS.md"),
        "benchmarks": included("benchmarks/README.md"),
        "contributing": included("CONTRIBUTING.md"),
    }
    for name, text in pages.items():
        file = folder / f"{name}.md"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


def api() -> str:
    """Every public name, with its example."""
    lines = ["# API", "", "Every public name, from its docstring. The examples are run by the tests.", ""]
    seen: set[int] = set()
    for package, about in PACKAGES.items():
        module = import_module(package)
        lines += [f"## {package}", "", about, ""]
        for name in module.__all__:
            value = getattr(module, name)
            if id(value) in seen:
                continue
            seen.add(id(value))
            lines += [f"### {name}", "", *_documented(package, name, value), ""]
    for module, names in FUNCTIONS.items():
        lines += [f"## {module}", ""]
        for name in names:
            lines += [f"### {name}", "", *_documented(module, name, getattr(import_module(module), name)), ""]
    return "\n".join(lines)


def _documented(package: str, name: str, value: Any) -> list[str]:
    if inspect.isclass(value):
        members = "\n   :members:\n   :no-inherited-members:" if package not in ("foldrank.hf",) else ""
        return ["```{eval-rst}", f".. autoclass:: {package}.{name}{members}", "```"]
    if callable(value):
        return ["```{eval-rst}", f".. autofunction:: {package}.{name}", "```"]
    return [_data(package, name)]


def _data(package: str, name: str) -> str:
    """The docstring under a value, where it is assigned."""
    for file in sorted((SOURCE.parent / package.replace(".", "/")).glob("*.py")):
        body = ast.parse(file.read_text()).body
        for assigned, below in itertools.pairwise(body):
            targets = assigned.targets if isinstance(assigned, ast.Assign) else [getattr(assigned, "target", None)]
            named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
            if named and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                return f"`{package}.{name}`: {' '.join(str(below.value.value).split())}"
    return f"`{package}.{name}`"


def commands() -> str:
    """Every command, from the parser."""
    from foldrank.cli import EXIT_CODES

    codes = [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()]
    return "\n".join(
        [
            "# Commands",
            "",
            "From the parser itself. Each takes `--json` too: one JSON object as result, and nothing else.",
            "",
            "## Exit codes",
            "",
            "| code | meaning |",
            "|---|---|",
            *codes,
            "",
            "A message is one line of at most 300 characters on standard error. What it can say is listed in",
            "[troubleshooting](troubleshooting.md).",
            "",
            "## All commands",
            "",
            "```{eval-rst}",
            ".. argparse::",
            "   :module: foldrank.cli",
            "   :func: full_parser",
            "   :prog: foldrank",
            "   :nodescription:",
            "   :noepilog:",
            "```",
            "",
        ]
    )


def settings() -> str:
    """Every setting of a recipe and of a fine-tuning, with its default and its meaning."""
    from foldrank.finetune.settings import default_of, setting_help
    from foldrank.recipes.schema import field_defaults, field_help

    defaults = field_defaults()
    lines = [
        "# Settings",
        "",
        "From the classes that hold them: each with its default, and its meaning with its unit. On a command line each is",
        "an option of its name; in a recipe's YAML dots are levels. `null` is off.",
        "",
    ]
    by_group: dict[str, list[str]] = {}
    for name, meaning in field_help().items():
        group = name.rpartition(".")[0] or "recipe"
        value = _default(defaults[name]) if name in defaults else "must be given"
        by_group.setdefault(group, []).append(f"| `{name}` | {value} | {_text(meaning)} |")
    for group, rows in by_group.items():
        lines += [f"## {group}", "", "| setting | default | meaning |", "|---|---|---|", *rows, ""]
    rows = [
        f"| `{name}` | {_default(default_of(name))} | {_text(meaning)} |" for name, meaning in setting_help().items()
    ]
    lines += ["## Fine-tuning", "", "| setting | default | meaning |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def recipes() -> str:
    """Every shipped recipe in a line."""
    from foldrank.core.inventory import count_parameters
    from foldrank.recipes import RECIPES
    from foldrank.train.model import shape_of

    rows = []
    for name, recipe in RECIPES.items():
        low, train = recipe.low_rank, recipe.train
        method = "dense" if low is None else low.backbone + ("-dlr" if low.residual else "")
        rank = "" if low is None or low.rank is None else f"{low.rank}"
        tokens = train.steps * train.batch_size * train.sequence_length
        rows.append(
            f"| `{name}` | {method} | {rank} | {count_parameters(shape_of(recipe)) / 1e6:,.1f} | {train.optimizer} | "
            f"{train.learning_rate:g} | {train.steps:,} | {tokens / 1e6:,.1f} |"
        )
    return "\n".join(
        [
            "# Recipes",
            "",
            "`foldrank pretrain NAME` trains one, `--print_config` shows its settings, `foldrank plan NAME` what it",
            "costs. A recipe of your own is a YAML file that names one of these as `base` and says what differs.",
            "",
            "| recipe | method | rank | million parameters | optimizer | learning rate | steps | million tokens |",
            "|---|---|---:|---:|---|---:|---:|---:|",
            *rows,
            "",
        ]
    )


def files() -> str:
    """What a run's folder holds, from the class that names it, and what its metrics are."""
    from foldrank.finetune.folder import FinetuneFolder
    from foldrank.finetune.metrics import FinetuneMetrics
    from foldrank.train.metrics import RunMetrics
    from foldrank.train.run_folder import RunFolder

    lines = ["# Files of a run", "", "## Pre-training", "", *_paths(RunFolder), ""]
    lines += ["`report.html`", ": The page of the run, made again by `foldrank report` ([runs](../runs.md)).", ""]
    lines += ["## Fine-tuning", "", *_paths(FinetuneFolder), ""]
    lines += ["## metrics.json", "", "| name | meaning |", "|---|---|", *_fields(RunMetrics), ""]
    lines += ["## metrics.json of a fine-tuning", "", "| name | meaning |", "|---|---|", *_fields(FinetuneMetrics), ""]
    return "\n".join(lines)


def _paths(folder: type) -> Iterator[str]:
    for name, value in inspect.getmembers(folder, lambda value: isinstance(value, property)):
        path = value.fget(folder(Path("RUN"))) if value.fget else None
        if isinstance(path, Path) and name in vars(folder):
            yield f"`{path.relative_to('RUN')}`"
            yield f": {' '.join((value.__doc__ or '').split())}"
            yield ""


def _fields(of: type) -> Iterator[str]:
    """The fields of a dataclass with the docstrings under them."""
    tree = ast.parse(inspect.cleandoc(inspect.getsource(of)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    meanings: dict[str, str] = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            said = below.value if isinstance(below, ast.Expr) else None
            meanings[field.target.id] = str(said.value) if isinstance(said, ast.Constant) else ""
    for field in dataclasses.fields(of):
        yield f"| `{field.name}` | {_text(meanings.get(field.name, ''))} |"


def results() -> str:
    """What our own studies showed, from their records."""
    from foldrank.compare.analysis import analyse_folder
    from foldrank.compare.headline import headline

    lines = [
        "# Results",
        "",
        "From the records of our own studies, negative ones included, by the same code that reports yours. What was",
        "tried besides is in [the experiments](experiments.md), time and memory in [the benchmarks](benchmarks.md).",
        "",
    ]
    for folder in sorted(path.parent for path in (ROOT / "studies").glob("*/study.yaml")):
        analysis = analyse_folder(folder)
        lines += [f"## {_text(analysis.title)}", "", _text(analysis.question), ""]
        for sentence in headline(analysis):
            lines += [_text(sentence), ""]
        lines += [f"The whole report, with its records: `studies/{folder.name}/report.md`.", ""]
    return "\n".join(lines)


def included(name: str) -> str:
    """A file of the repository as a page; what it links to lies in the repository, or on the site."""
    text = (ROOT / name).read_text()
    base = (ROOT / name).parent

    def link(found: re.Match[str]) -> str:
        label, target = found[1], found[2]
        if re.match(r"\w+:|#", target):
            return found[0]
        path = Path(os.path.normpath(base / target.partition("#")[0])).relative_to(ROOT)
        pages = {"CHANGELOG.md": "changelog", "EXPERIMENTS.md": "experiments", "CONTRIBUTING.md": "contributing"}
        pages["benchmarks/README.md"] = "benchmarks"
        if path.as_posix() in pages:
            return f"[{label}]({pages[path.as_posix()]}.md)"
        if path.parts[0] == "docs" and path.suffix == ".md":
            return f"[{label}](../{path.relative_to('docs').as_posix()})"
        return f"{label} (`{path.as_posix()}`)"

    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", link, text)


def _default(value: Any) -> str:
    return f"`{_text('null' if value is None else str(value).lower() if isinstance(value, bool) else str(value))}`"
