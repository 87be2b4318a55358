"""The page of runs, one or several laid over each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foldrank.atomic import write_text
from foldrank.recipes.reading import diff
from foldrank.recipes.schema import Recipe
from foldrank.recipes.shipped import RECIPES
from foldrank.report.blocks import Block, Document, Points, Sample, Section, Text, grid
from foldrank.report.formatting import NONE, count, loss, mebibytes, perplexity, seconds
from foldrank.report.html import html
from foldrank.runs.charts import along_seconds, along_tokens, by_layer, losses, over_steps
from foldrank.runs.run import Run, read_run

PAGE = "report.html"
TEXTS = 12
"""Most texts of a run that a page shows."""
LONGEST = 2000
"""Characters of a text that are shown."""
ROWS = 60
"""Most evaluations or notes in a table."""


def write_page(folders: Sequence[Path], file: Path) -> list[Run]:
    """Writes the page of the runs in these folders.

    Raises:
        ValueError: where one of them holds no run.
    """
    runs = [read_run(folder) for folder in folders]
    write_text(file, html(document(runs)))
    return runs


def document(runs: Sequence[Run]) -> Document:
    """What the page says."""
    named = _named(runs)
    chart = losses(named)
    sections = [
        Section(
            id="answer",
            title="In short",
            blocks=[*(Text(text=in_short(name, run)) for name, run in named), *([chart] if chart else [])],
        ),
        Section(id="training", title="While it trained", blocks=over_steps(named) or [Text(text="Nothing is logged.")]),
        _part("evaluations", "Evaluations", named, _evaluations),
        _part("notes", "What went wrong, and where it went on", named, _notes),
        _part("trained", "What was trained", named, _trained),
        _part("texts", "Texts that it wrote", named, _texts),
        _part("fold", "The fold", named, _fold),
    ]
    return Document(
        title=named[0][0] if len(named) == 1 else f"{len(named)} runs",
        question=str(named[0][1].path) if len(named) == 1 else ", ".join(name for name, _ in named),
        banner=" ".join(filter(None, (_banner(name, run) for name, run in named))) or None,
        sections=[section for section in sections if section.blocks or section.parts],
        footer="Made by foldrank from the settings, log.jsonl and metrics.json of the run's folder.",
    )


def _named(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    """Each with a name that no other has."""
    names = [run.name for run in runs]
    return [(name if names.count(name) == 1 else str(run.path), run) for name, run in zip(names, runs, strict=True)]


def _part(identity: str, title: str, named: Sequence[tuple[str, Run]], blocks: Any) -> Section:
    if len(named) == 1:
        return Section(id=identity, title=title, blocks=blocks(named[0][1], identity))
    parts = [
        Section(id=f"{identity}-{number}", title=name, blocks=found)
        for number, (name, run) in enumerate(named, 1)
        if (found := blocks(run, f"{identity}-{number}"))
    ]
    return Section(id=identity, title=title, parts=parts)


def in_short(name: str, run: Run) -> str:
    """How far it is, and how good."""
    log, metrics = run.log, run.metrics or {}
    done = f"{count(log.step)} of {count(run.steps)} steps" if run.steps else f"{count(log.step)} steps"
    tokens, spent_on = along_tokens(run, [log.step]), along_seconds(run, [log.step])
    spent = [f"{count(tokens[0])} tokens"] if tokens else []
    spent += [f"{seconds(spent_on[0])} seconds of training"] if spent_on else []
    cost = f" ({', '.join(spent)})" if spent else ""
    sentence = f"{name}: {done}{cost}"
    if run.kind == "finetune" and metrics:
        before, after = metrics.get("before"), metrics.get("after")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            pairs = [f"{what} {_value(before.get(what))} to {_value(value)}" for what, value in after.items()]
            return f"{sentence}; held-out examples before and after: {'; '.join(pairs)}."
    folded = _number(metrics, "val_loss_folded")
    if folded is not None:
        error = _number(metrics, "fold_max_abs_logit_drift")
        kept = "" if error is None else "; the fold changed no logit" + (f" by more than {error:.2g}" if error else "")
        return f"{sentence}; validation loss {loss(folded)}, perplexity {perplexity(folded)}, folded{kept}."
    if log.evaluations:
        last = log.evaluations[-1]
        return f"{sentence}; validation loss {loss(last.loss)} after step {count(last.step)}."
    return f"{sentence}; training loss {loss(log.points[-1].loss)}." if log.points else f"{sentence}."


def _banner(name: str, run: Run) -> str | None:
    if run.damaged is not None:
        return f"{name}: its metrics.json is damaged ({run.damaged})."
    match run.state:
        case "running":
            return f"{name} is still running: the page shows how far it was when it was made."
        case "stopped":
            return f"{name} ended early: {run.log.stopped} To go on: {run.resume_line}"
        case "dead":
            return f"{name} ended without a word after step {count(run.log.step)}. To go on: {run.resume_line}"
        case _:
            return None


def _evaluations(run: Run, identity: str) -> list[Block]:
    shown = _evenly(run.log.evaluations, ROWS)
    if not shown:
        return []
    steps = [each.step for each in shown]
    tokens, spent = along_tokens(run, steps), along_seconds(run, steps)
    rows = [
        (
            count(each.step),
            count(tokens[number]) if tokens else NONE,
            seconds(spent[number]) if spent else NONE,
            NONE if each.train_loss is None else loss(each.train_loss),
            loss(each.loss),
            perplexity(each.loss),
        )
        for number, each in enumerate(shown)
    ]
    cut = f", {len(shown)} of {count(len(run.log.evaluations))}" if len(run.log.evaluations) > len(shown) else ""
    columns = "Step|Tokens>|Seconds of training>|Training loss since>|Validation loss>|Perplexity>"
    return [grid(f"{identity}-table", f"Evaluations{cut}", columns, rows)]


def _notes(run: Run, identity: str) -> list[Block]:
    moments = [(session.step, "began" if session.step == 0 else "went on from a checkpoint", session.host)
               for session in run.log.sessions]  # fmt: skip
    notes = [(step, f"{what}{f' on {host}' if host else ''}") for step, what, host in moments] + run.log.notes
    notes.sort(key=lambda each: each[0])
    shown = notes if len(notes) <= ROWS else [*notes[: ROWS // 2], *notes[-ROWS // 2 :]]
    cut = f", {len(shown)} of {count(len(notes))}" if len(notes) > len(shown) else ""
    rows = [(count(step), note) for step, note in shown]
    return [grid(f"{identity}-table", f"Events{cut}", "Step|What happened", rows)] if rows else []


def _trained(run: Run, identity: str) -> list[Block]:
    metrics = run.metrics or {}
    versions = _table(run.about.get("versions"))
    hashes = {**run.about, **_table(run.about.get("data"))}
    rows = [
        ("Seed", run.settings.get("seed")),
        ("Parameters, deployed", _count(metrics.get("params"))),
        ("Parameters, dense equivalent", _count(metrics.get("params_dense"))),
        ("Parameters trained", _count(metrics.get("params_trained"))),
        ("Data", _data(run.settings)),
        ("Hash of the text", hashes.get("text_sha256") or hashes.get("data_sha256")),
        ("Hash of the tokenizer", hashes.get("tokenizer_sha256")),
        ("Checkpoint it began with", run.about.get("checkpoint")),
        ("Hash of its weights", run.about.get("checkpoint_sha256")),
        ("Where the weights come from", "; ".join(map(str, run.about.get("lineage") or ()))),
        ("Planned memory", mebibytes(sum(parts)) if (parts := _numbers(metrics.get("memory_bytes"))) else None),
        ("Device", metrics.get("device")),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("Commit of foldrank", run.about.get("commit")),
    ]
    shown = [(what, str(value)) for what, value in rows if value not in (None, "")]
    return [grid(f"{identity}-table", "The run", "What|Value", shown), *_settings(run)]


def _settings(run: Run) -> list[Block]:
    """Which settings differ from the recipe's, or all of a fine-tuning's."""
    if run.kind == "finetune":
        return [Points(items=[f"{name}: {value}" for name, value in run.settings.items()])]
    try:
        recipe = Recipe.from_dict(dict(run.settings))
    except (ValueError, TypeError) as error:
        return [Text(text=f"Its settings cannot be read: {error}")]
    base = RECIPES.get(run.name)
    if base is None:
        return [Text(text=f"{run.name} is no shipped recipe: all its settings are in config.yaml.")]
    changed = diff(base, recipe)
    if not changed:
        return [Text(text=f"Its settings are those of the recipe {run.name}.")]
    return [Text(text=f"Settings that differ from the recipe {run.name}:"), Points(items=changed)]


def _data(settings: Mapping[str, Any]) -> str | None:
    data = settings.get("data")
    if isinstance(data, Mapping):
        return ", ".join(f"{name} {value}" for name, value in data.items() if value is not None)
    return None if data is None else str(data)


def _texts(run: Run, _: str) -> list[Block]:
    blocks: list[Block] = [
        Sample(title=f"After step {count(step)}", text=text[:LONGEST]) for step, text in _evenly(run.log.texts, TEXTS)
    ]
    if isinstance(sample := (run.metrics or {}).get("sample"), str):
        blocks.append(Sample(title="The folded model", text=sample[:LONGEST]))
    return blocks


def _fold(run: Run, identity: str) -> list[Block]:
    metrics = run.metrics or {}
    if _number(metrics, "val_loss_folded") is None:
        return []
    rows = [
        ("Validation loss before", _form(metrics, "val_loss", ".6f")),
        ("Validation loss after", _form(metrics, "val_loss_folded", ".6f")),
        ("Layers that were folded", _form(metrics, "folded_layers", ",.0f")),
        ("Largest change of a logit", _form(metrics, "fold_max_abs_logit_drift", ".2e")),
        ("Largest rounding of a weight", _form(metrics, "fold_max_abs_weight_rounding", ".2e")),
        ("Same next token before and after", _form(metrics, "fold_argmax_agreement", ".2%")),
    ]
    charts = [
        by_layer(
            f"{identity}-rounding",
            "Largest rounding of a weight, by layer",
            "Against the sum in float64. Blocks from top to bottom.",
            _by_layer(metrics.get("fold_weight_rounding")),
            ".1e",
        ),
        by_layer(
            f"{identity}-ranks",
            "Effective rank, by layer",
            "Of the deployed matrix: exp of the entropy of its singular values over their sum (Roy and Vetterli 2007).",
            _by_layer(metrics.get("effective_ranks")),
            ".1f",
        ),
    ]
    table = grid(f"{identity}-table", "Before the fold and after", "What|Value>", rows)
    return [table, *(chart for chart in charts if chart is not None)]


def _evenly(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(number * (len(values) - 1) / (most - 1))] for number in range(most)]


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(values: Mapping[str, Any], name: str) -> float | None:
    value = values.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _numbers(values: object) -> list[float]:
    return list(_by_layer(values).values())


def _by_layer(values: object) -> dict[str, float]:
    if not isinstance(values, Mapping):
        return {}
    return {str(name): float(value) for name, value in values.items() if isinstance(value, int | float)}


def _count(value: object) -> str | None:
    return count(value) if isinstance(value, int | float) else None


def _value(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else NONE


def _form(values: Mapping[str, Any], name: str, form: str) -> str:
    value = _number(values, name)
    return NONE if value is None else format(value, form)
