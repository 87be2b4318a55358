"""The main job, from text to a folded checkpoint: read `pretrain` from top to bottom."""

import json
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from foldrank.atomic import write_text
from foldrank.core.anchored_decay import fold_at_start_
from foldrank.core.fold import fold_
from foldrank.core.inventory import count_parameters
from foldrank.data.prepare import Progress
from foldrank.data.stream import open_data
from foldrank.recipes.reading import diff, load_recipe
from foldrank.recipes.schema import Recipe
from foldrank.train.ablations import start_as_ablation_
from foldrank.train.accounting import memory, training_flops
from foldrank.train.activation_checkpointing import checkpoint_activations_
from foldrank.train.callbacks import GradientSpikes, JsonLines, StopOnSignal, TrainingProgressBar
from foldrank.train.checkpoints import checkpoints, step_of, verify
from foldrank.train.evaluate import continue_text, drift, evaluate_loss, first, logits_of
from foldrank.train.malloc import apply_malloc_settings
from foldrank.train.model import build_model, dense_parameters, meta_model, resolve_vocab_size
from foldrank.train.trainer import PretrainTrainer, training_arguments

SCHEMA = 1
"""Version of config.yaml and metrics.json."""

FOLD_CHECK_SEQUENCES = 32
"""Validation sequences on which the fold is verified."""


class InterruptedRunError(Exception):
    """A run that a signal ended early, after it saved a checkpoint."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def pretrain(
    recipe: Recipe,
    out: Path,
    *,
    name: str = "custom",
    overwrite: bool = False,
    resume: bool | Path = False,
    progress: Progress = lambda *_: None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains a recipe's model, folds it, verifies the fold, and saves what is deployed.

    Under `torchrun` or `accelerate launch` every process calls it with the same arguments. On a CPU the process keeps
    what it frees from then on (`apply_malloc_settings`).

    Args:
        recipe: all settings.
        out: the run's folder. Gets `config.yaml`, `log.jsonl`, `checkpoints/`, `unfolded/` (the trained weights),
            `folded/` (the deployed checkpoint with its tokenizer) and, last, `metrics.json`.
        name: what the metrics call the recipe.
        overwrite: replace what `out` holds.
        resume: go on with the run in `out`, from its newest checkpoint or from the one given.
        progress: told how far the preparation of the data is.
        quiet: show nothing while training.

    Returns:
        What `metrics.json` holds.

    Raises:
        ValueError: for settings that do not fit, text too short for them, a checkpoint that is damaged or of other
            settings, and a loss that is not finite.
        FileExistsError: where `out` holds something and neither `overwrite` nor `resume` is given.
        OSError: where something cannot be written.
        InterruptedRunError: after SIGTERM or SIGINT, with a checkpoint saved.
    """
    processes = PartialState(cpu=recipe.train.device == "cpu")
    checkpoint = find_checkpoint(recipe, out, resume) if resume else None
    if not resume:
        check_output_dir(out, overwrite=overwrite)
    # Settings that do not fit are refused before anything slow begins; the vocabulary matters to none of them.
    checkpoint_activations_(
        meta_model(recipe, recipe.model.vocab_size or recipe.data.vocab_size), recipe.train.activation_checkpointing
    )
    arguments = training_arguments(recipe, out)
    if arguments.device.type == "cpu":
        apply_malloc_settings()
    with processes.main_process_first():
        data = open_data(recipe.data, progress)
    tokenizer = data.tokenizer()
    train = recipe.train
    training = data.training(
        train.sequence_length, train.layout, seed=recipe.seed, num_sequences=train.steps * train.batch_size
    )
    tokens = training.num_tokens()
    tokens_per_step = tokens / train.steps
    validation = data.validation(train.sequence_length, train.layout, train.eval_tokens)
    test = None
    if train.test_tokens is not None and train.eval_tokens is not None:
        test = data.test(
            train.sequence_length, train.layout, validation_tokens=train.eval_tokens, tokens=train.test_tokens
        )
    special: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = build_model(recipe, resolve_vocab_size(recipe, tokenizer), **special)
    decay = fold_at_start_(model).decay if train.fold_at_start else None
    if train.ablation is not None:
        start_as_ablation_(model, train.ablation)

    if processes.is_main_process and not resume:
        if out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True)
        save_config(recipe, name, out / "config.yaml")
    processes.wait_for_everyone()
    stop = StopOnSignal()
    trainer = PretrainTrainer(
        model=model,
        args=arguments,
        train_dataset=training,
        eval_dataset=validation,
        keep_checkpoints=train.keep_checkpoints,
        decay=decay,
        tokenizer=tokenizer,
        callbacks=[
            stop,
            *(() if quiet else (GradientSpikes(), TrainingProgressBar(tokens_per_step))),
            JsonLines(out / "log.jsonl"),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    with stop:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = trainer.training_seconds()
    if stop.received is not None and trainer.state.global_step < train.steps:
        raise InterruptedRunError(
            stop.received,
            f"stopped by {stop.received.name} after step {trainer.state.global_step} of {train.steps}; a checkpoint is "
            f"saved: go on with --out {out} --resume",
        )

    model.config.use_cache = True
    unfolded = evaluate_loss(model, validation)
    verified_on = first(validation, FOLD_CHECK_SEQUENCES)
    logits_before = logits_of(model, verified_on)
    if processes.is_main_process:
        save(model, tokenizer, out / "unfolded")
    fold_report = fold_(model)
    changed = drift(logits_before, logits_of(model, verified_on))
    folded = evaluate_loss(model, validation)
    tested = None if test is None else evaluate_loss(model, test)
    if processes.is_main_process:
        save(model, tokenizer, out / "folded")

    shape = meta_model(recipe, model.config.vocab_size)
    per_token = training_flops(
        shape,
        train,
        gpus=arguments.world_size * max(1, arguments.n_gpu),
        checkpointing=train.activation_checkpointing,
    )
    started_at = 0 if checkpoint is None else step_of(checkpoint)
    metrics = {
        "schema": SCHEMA,
        "recipe": name,
        "seed": recipe.seed,
        "params": count_parameters(model),
        "params_dense": dense_parameters(recipe, model.config.vocab_size),
        "steps": train.steps,
        "tokens": tokens,
        "flops_per_token": per_token.total,
        "flops": per_token.total * train.steps * train.batch_size * train.sequence_length,
        "memory_bytes": memory(shape, train, checkpointing=train.activation_checkpointing).parts(),
        "train_tokens_available": data.tokens("train"),
        "text_sha256": data.text_sha256(),
        "resumed_at_step": started_at,
        "seconds": seconds,
        "tokens_per_second": (train.steps - started_at) * tokens_per_step / seconds,
        "val_tokens": unfolded.tokens,
        "val_loss": unfolded.loss,
        "val_perplexity": unfolded.perplexity,
        "val_loss_folded": folded.loss,
        "val_perplexity_folded": folded.perplexity,
        "test_tokens": None if tested is None else tested.tokens,
        "test_loss": None if tested is None else tested.loss,
        "test_perplexity": None if tested is None else tested.perplexity,
        "folded_layers": len(fold_report.errors),
        "fold_max_abs_weight_rounding": fold_report.max_abs_error,
        "fold_weight_rounding": dict(fold_report.errors),
        "fold_max_abs_logit_drift": changed.max_abs_logit,
        "fold_argmax_agreement": changed.argmax_agreement,
        "history": history(trainer, tokens_per_step),
        "sample": continue_text(model, tokenizer, recipe.sample_prompt, seed=recipe.seed),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
    }
    if processes.is_main_process:
        write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def find_checkpoint(recipe: Recipe, out: Path, resume: bool | Path) -> Path | None:
    """The verified checkpoint from which the run in `out` goes on; None where it has none yet and starts again.

    Raises:
        ValueError: where `out` holds no such run or a finished one, the recipe differs, or the checkpoint is damaged.
    """
    if not (out / "config.yaml").exists():
        raise ValueError(f"{out} holds no run to go on with: leave out --resume to start one")
    if (out / "metrics.json").exists():
        raise ValueError(f"the run in {out} is finished: nothing is left to do")
    then = load_recipe(str(out / "config.yaml"))
    if changed := diff(then, recipe):
        raise ValueError(f"the run in {out} was started with other settings: {'; '.join(changed[:3])}")
    if isinstance(resume, Path):
        newest: Path | None = resume
    else:
        newest = next(reversed(checkpoints(out / "checkpoints")), None)
    if newest is not None:
        verify(newest)
    return newest


def check_output_dir(out: Path, *, overwrite: bool) -> None:
    """Refuses a folder that holds something, saying what. Nothing but a run is ever overwritten.

    Raises:
        FileExistsError: naming the run that the folder holds.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "config.yaml").exists():
        what = "holds files that are no run" if out.is_dir() else "is a file"
        raise FileExistsError(f"{out} {what}: choose another folder with --out")
    if overwrite:
        return
    if not (out / "metrics.json").exists():
        saved = checkpoints(out / "checkpoints")
        at = f"its newest checkpoint is of step {step_of(saved[-1])}" if saved else "it has no checkpoint yet"
        raise FileExistsError(f"{out} holds a run that did not finish, {at}: go on with --resume, or --overwrite it")
    try:
        metrics = json.loads((out / "metrics.json").read_text())
        what = (
            f"recipe {metrics['recipe']}, seed {metrics['seed']}, {metrics['steps']} steps, "
            f"validation perplexity {metrics['val_perplexity_folded']:.2f}"
        )
    except (ValueError, KeyError) as error:
        what = f"its metrics.json is damaged: {error}"
    raise FileExistsError(
        f"{out} holds a finished run ({what}): choose another folder with --out, or replace it with --overwrite"
    )


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Model and tokenizer in the Hugging Face format, whole or not at all.

    Raises:
        OSError: where it cannot be written.
    """
    work = folder.with_name(f"{folder.name}.partial")
    try:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        if folder.exists():  # of an attempt before this one
            shutil.rmtree(folder)
        work.rename(folder)
    except Exception as error:  # safetensors and tokenizers have errors of their own for a full disk
        raise OSError(f"{folder} was not written: {error}. With room for it, go on with --resume") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def save_config(recipe: Recipe, name: str, file: Path) -> None:
    """The resolved settings, as a recipe that can be run again, with what they ran on."""
    about = {"schema": SCHEMA, "recipe": name, "versions": versions(), "commit": commit()}
    write_text(file, yaml.safe_dump({"run": about, **recipe.to_dict()}, sort_keys=False))


def history(trainer: PretrainTrainer, tokens_per_step: float) -> list[dict[str, Any]]:
    """At each evaluation: tokens and seconds of training, training loss (mean since the evaluation before), validation
    loss. The seconds of a run that was interrupted are not known.
    """
    rows, losses = [], []
    for entry in trainer.state.log_history:
        if "loss" in entry:
            losses.append(entry["loss"])
        if "eval_loss" in entry:
            mean = sum(losses) / len(losses) if losses else None
            rows.append(
                {
                    "step": entry["step"],
                    "tokens": round(entry["step"] * tokens_per_step),
                    "seconds": trainer.seconds_at.get(int(entry["step"])),
                    "train_loss": mean,
                    "val_loss": entry["eval_loss"],
                }
            )
            losses = []
    return rows


def versions() -> dict[str, str]:
    """What the run ran on."""
    packages = ("foldrank", "torch", "transformers", "accelerate", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def commit() -> str | None:
    """The git commit of this source tree, where it is one."""
    found = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None
