"""The main job, from text to a folded checkpoint: read `pretrain` from top to bottom."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback

from foldrank.atomic import write_text
from foldrank.core.anchored_decay import AnchoredDecay, fold_at_start_
from foldrank.core.fold import fold_
from foldrank.data.prepare import Progress
from foldrank.data.stream import PackedStream, resolve_source
from foldrank.recipes.schema import Recipe
from foldrank.train.ablations import start_as_ablation_
from foldrank.train.accounting import FOLD_CHECK_SEQUENCES
from foldrank.train.callbacks import PauseAfter, SaveAfter, StopOnSignal, TrainingProgressBar
from foldrank.train.checkpoints import copy_checkpoint
from foldrank.train.compilation import Compiled, compile_, resolve_compile
from foldrank.train.device_memory import check_memory, device_memory, fit, memory_explained, room
from foldrank.train.evaluate import continue_text, evaluate_loss, first, fold_error, logits_of
from foldrank.train.health import Health
from foldrank.train.inputs import RunInputs, prepare_inputs
from foldrank.train.lineage import Branch, branch, check_initial, initialize_
from foldrank.train.measurement import Folded, measured
from foldrank.train.metrics import RunMetrics
from foldrank.train.model import build_model, check_recipe, resolve_vocab_size, shape_of
from foldrank.train.model_card import model_card
from foldrank.train.perturbation import START_SEQUENCES, start_losses
from foldrank.train.processes import first_alone, peers_watched, shared_by
from foldrank.train.run_folder import RunFolder, save
from foldrank.train.run_log import RunLog, end_logged
from foldrank.train.schedule import stable_until
from foldrank.train.sharding import Placement, by_first_process_, check_processes, is_spread, plan_of
from foldrank.train.trainer import PretrainTrainer, training_arguments
from foldrank.train.utilization import Utilization

TEXT = 32
"""Tokens of the text that the model writes at each evaluation."""


class InterruptedRunError(Exception):
    """A run that a signal ended early, after it saved a checkpoint."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class PausedRunError(Exception):
    """A run that ended after the step that it was asked to, with a checkpoint saved and its validation loss there."""

    def __init__(self, step: int, val_loss: float) -> None:
        super().__init__(f"paused after step {step}, validation loss {val_loss:.4f}")
        self.val_loss = val_loss


def pretrain(
    recipe: Recipe,
    out: Path,
    *,
    name: str = "custom",
    overwrite: bool = False,
    resume: bool | Path = False,
    branch_from: Path | None = None,
    init_from: Path | None = None,
    pause_after: int | None = None,
    progress: Progress = lambda *_: None,
    quiet: bool = False,
) -> RunMetrics:
    """Trains a recipe's model, folds it, verifies the fold, and saves what is deployed.

    Under `torchrun` or `accelerate launch` every process calls it with the same arguments. It works in any thread; only
    in the main one it can save and stop at a signal.

    Args:
        recipe: all settings.
        out: the run's folder. Gets `config.yaml`, `log.jsonl`, `checkpoints/`, `unfolded/` (the trained weights),
            `folded/` (the deployed checkpoint with its tokenizer) and, last, `metrics.json`. The command adds a page.
        name: what the metrics call the recipe.
        overwrite: replace the run that `out` holds.
        resume: go on with the run in `out`, from its newest checkpoint or from the one given; with another end, where
            its schedule allows one (train/schedule.py).
        branch_from: a run, or a checkpoint of one, from which this new run goes on to an end of its own.
        init_from: a run, or any checkpoint of this family and shape, with whose weights this new run begins.
        pause_after: a step after which the run is evaluated and saved and ends, to go on by `resume`.
        progress: told how far the preparation of the data is.
        quiet: show nothing while training, and let the model write nothing at its evaluations.

    Returns:
        What `metrics.json` holds.

    Raises:
        ValueError: for settings that do not fit, text too short for them or changed since the run began, a checkpoint
            that is damaged or of another run or of other settings, and a loss that is not finite.
        FileExistsError: where `out` holds something and neither `overwrite` nor `resume` is given, or another run.
        OSError: where something cannot be written.
        InterruptedRunError: after SIGTERM, SIGINT or SIGHUP, with a checkpoint saved.
        PausedRunError: after `pause_after`.
    """
    processes = shared_by(recipe.train.device, recipe.train.patience)
    recipe = replace(recipe, data=resolve_source(recipe.data))
    run = RunFolder(out)
    claimed = run.claimed() if processes.is_main_process else nullcontext()
    with _environment_restored(), claimed, peers_watched():
        # Refuse what cannot work, before anything slow begins and before anything is made or deleted.
        check_recipe(recipe)
        device, gpus = torch.device(str(processes.device)), check_processes(recipe.train, processes.num_processes)
        compiled = _check_device(recipe, device, gpus, out)
        checkpoint = run.find_checkpoint(recipe, resume) if resume else None
        if not resume:
            run.check_free(overwrite=overwrite)
        if init_from:
            check_initial(init_from, recipe, alone=not (resume or branch_from))
        origin = branch(branch_from, recipe, out, resume=bool(resume)) if branch_from else None

        # Prepare: text to token ids, once; a run that goes on opens what it was trained on.
        with first_alone(processes):
            opened = run if resume else origin.run if origin else None
            inputs = prepare_inputs(recipe, opened, checkpoint, progress)

        # Build: what the recipe leaves open, for this device and vocabulary; the model, perhaps folded at the start.
        vocab_size = resolve_vocab_size(recipe, inputs.tokenizer)
        fitted = fit(recipe, room(device), processes=gpus, vocab_size=vocab_size)
        with memory_explained(fitted, str(device), processes=gpus, vocab_size=vocab_size):
            model, decay, start, lineage = _build(fitted, inputs, str(device), init_from)
            compile_(model, compiled)

            # Train. From here on the folder is this run's.
            if processes.is_main_process and not resume:
                _begin(run, recipe, name, inputs, origin, lineage)
            elif processes.is_main_process:
                run.go_on(recipe, checkpoint)
            with peers_watched(run.path):
                processes.wait_for_everyone()
                checkpoint = run.checkpoints / origin.checkpoint.name if origin else checkpoint
                trainer = _train(fitted, run, model, decay, inputs, checkpoint, pause_after, quiet=quiet)

                # Fold, verify that nothing changed but roundings, and save both forms.
                folded = _fold_and_verify(model, inputs, run, trainer, save_here=processes.is_main_process)

        # Record.
        metrics = measured(fitted, name, model, inputs, trainer, start, folded, checkpoint, run.read_config().lineage)
        if processes.is_main_process:
            write_text(run.folded / "README.md", model_card(fitted, metrics))
            metrics.write(run.metrics)
        return metrics


def _check_device(recipe: Recipe, device: torch.device, gpus: int, out: Path) -> Compiled:
    """What is compiled here; refuses a recipe that needs more memory, or a compiler or tracker that is not there."""
    compiled = resolve_compile(recipe.train, device.type)
    fitted = fit(recipe, room(device), processes=gpus, vocab_size=recipe.nominal_vocab_size)
    if gpus == 1:
        check_memory(fitted, device_memory(str(device)), vocab_size=recipe.nominal_vocab_size)
    training_arguments(fitted, out)
    return compiled


def _begin(
    run: RunFolder, recipe: Recipe, name: str, inputs: RunInputs, origin: Branch | None, lineage: tuple[str, ...]
) -> None:
    run_id = uuid.uuid4().hex
    run.begin(recipe, name, run_id, inputs.identity, origin.lineage if origin else lineage)
    inputs.write_evaluation_text(run.evaluation_text, recipe)
    if origin:
        copy_checkpoint(origin.checkpoint, run.checkpoints / origin.checkpoint.name, run_id=run_id)


def _build(
    recipe: Recipe, inputs: RunInputs, device: str, init_from: Path | None
) -> tuple[PreTrainedModel, AnchoredDecay | None, tuple[float | None, float | None], tuple[str, ...]]:
    tokenizer, start, lineage = inputs.tokenizer, (None, None), ()
    special: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vocab_size, place = resolve_vocab_size(recipe, tokenizer), None
    if recipe.train.spreads:
        plan = plan_of(shape_of(recipe, vocab_size), recipe.train)
        place = Placement(recipe.train, torch.device(device), plan)
    model = build_model(recipe, vocab_size, device=device, place=place, **special)
    decay = place and place.decay
    if init_from:
        begin = partial(
            initialize_, source=init_from, tokenizer_hash=inputs.identity.tokenizer_sha256, seed=recipe.seed
        )
        whole = partial(build_model, recipe, vocab_size, device="cpu", **special)
        lineage = begin(model) if place is None else by_first_process_(model, whole, begin, folded=decay is not None)
    if not isinstance(inputs.training, PackedStream):
        batch = first(inputs.training, min(recipe.train.batch_size, START_SEQUENCES))
        with _narrow(model, recipe):
            start = start_losses(model, batch, batch_size=recipe.train.micro_batch_size or recipe.train.batch_size)
    if recipe.train.fold_at_start and decay is None:
        decay = fold_at_start_(model).decay
    if recipe.train.ablation is not None:
        start_as_ablation_(model, recipe.train.ablation, recipe.seed)
    return model, decay, start, lineage


def _train(
    recipe: Recipe,
    run: RunFolder,
    model: PreTrainedModel,
    decay: AnchoredDecay | None,
    inputs: RunInputs,
    checkpoint: Path | None,
    pause_after: int | None,
    *,
    quiet: bool,
) -> PretrainTrainer:
    stop, train = StopOnSignal(), recipe.train
    pause = () if pause_after is None else (PauseAfter(pause_after),)
    arguments = training_arguments(recipe, run.path)
    utilization = Utilization.of(recipe, arguments, model.config.vocab_size)
    if train.document_mask and arguments.device.type == "cuda":
        # SDPA's fast kernel takes no mask there; FlexAttention passes over the blocks of a mask that are empty.
        model.set_attn_implementation("flex_attention")
    shown = () if quiet else (TrainingProgressBar(inputs.training.num_tokens() / train.steps, utilization.of_steps),)
    # From there other ends branch off.
    before_decay = (stable_until(train),) if train.schedule == "wsd" else ()
    facts = {"tokens_per_step": inputs.training.num_tokens() / train.steps, **utilization.facts()}
    writes = None if quiet else lambda: _text(model, inputs, recipe)
    log = RunLog(run.log, facts, writes, together=is_spread(model))
    trainer = PretrainTrainer(
        model=model,
        args=arguments,
        train_dataset=inputs.training,
        eval_dataset=inputs.validation,
        keep_checkpoints=train.keep_checkpoints,
        always_keep=before_decay,
        decay=decay,
        optimizer=train.optimizer,
        newton_schulz_dtype=train.newton_schulz_dtype,
        skip_nonfinite=train.skip_nonfinite,
        tokenizer=inputs.tokenizer,
        run_id=run.read_config().id,
        # What it notes before the log, which has it whether somebody watches or not.
        callbacks=[stop, *pause, SaveAfter(before_decay), Health(quiet=quiet), *shown, log],
    )
    trainer.remove_callback(PrinterCallback)
    with stop, end_logged(log, trainer):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.finish_saving()
        trainer.accelerator.wait_for_everyone()  # for the first one, which writes: a launcher kills what is left
        if stop.received is not None and trainer.state.global_step < train.steps:
            raise InterruptedRunError(
                stop.received,
                f"stopped by {stop.received.name} after step {trainer.state.global_step} of {train.steps}; a "
                f"checkpoint is saved: go on with --out {run.path} --resume",
            )
    if pause_after is not None and trainer.state.global_step == pause_after < train.steps:
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        raise PausedRunError(pause_after, losses[-1])
    return trainer


def _narrow(model: PreTrainedModel, recipe: Recipe) -> torch.autocast:
    """What blocks whose weights are gathered in bfloat16 need where `Trainer` does not bring it."""
    narrow = recipe.train.dtype == "bfloat16" and is_spread(model)
    return torch.autocast(model.device.type, torch.bfloat16, enabled=narrow)


def _text(model: PreTrainedModel, inputs: RunInputs, recipe: Recipe) -> str:
    """What the model writes at an evaluation, without a trace in what comes after."""
    attention = model.config._attn_implementation or "sdpa"
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _narrow(model, recipe):
        model.set_attn_implementation("sdpa")
        try:
            tokens = min(TEXT, recipe.sample_tokens)
            return continue_text(model, inputs.tokenizer, recipe.sample_prompt, seed=recipe.seed, max_new_tokens=tokens)
        finally:
            model.set_attn_implementation(attention)


def _fold_and_verify(
    model: PreTrainedModel, inputs: RunInputs, run: RunFolder, trainer: PretrainTrainer, *, save_here: bool
) -> Folded:
    trainer.stop_the_clock()
    model.config.use_cache = True
    model.set_attn_implementation("sdpa")
    batch_size = trainer.args.eval_batch_size
    before = evaluate_loss(model, inputs.validation, batch_size=batch_size)
    verified_on = first(inputs.validation, FOLD_CHECK_SEQUENCES)
    logits_before = list(logits_of(model, verified_on, batch_size=batch_size))
    save_here = save_here or is_spread(model)
    if save_here:
        save(model, inputs.tokenizer, run.unfolded)
    report = fold_(model)
    error = fold_error(logits_before, logits_of(model, verified_on, batch_size=batch_size))
    after = evaluate_loss(model, inputs.validation, batch_size=batch_size)
    test = None if inputs.test is None else evaluate_loss(model, inputs.test, batch_size=batch_size)
    if save_here:
        save(model, inputs.tokenizer, run.folded)
    return Folded(report=report, error=error, before=before, after=after, test=test)


@contextmanager
def _environment_restored() -> Iterator[None]:
    """What the libraries below write into the environment is gone afterwards."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
