"""Fine-tuning, from a checkpoint to a checkpoint of the same kind: read `finetune` from top to bottom."""

import copy
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldrank.core.inventory import count_parameters
from foldrank.data.tokenizer import pad_token
from foldrank.finetune.adapters import merged, with_lora
from foldrank.finetune.classification import Classified, classify_rows, labels_of, load_classifier, scores
from foldrank.finetune.folder import FinetuneFolder
from foldrank.finetune.language import Tokenized, collate, set_chat_template_, tokenize
from foldrank.finetune.metrics import FinetuneMetrics
from foldrank.finetune.rows import Rows, read_rows
from foldrank.finetune.settings import FinetuneSettings
from foldrank.finetune.trainers import make_trainer
from foldrank.hf.checkpoint import inspect, load
from foldrank.hf.checksums import read_checksums
from foldrank.provenance import commit, sha256_of_file, versions
from foldrank.train.callbacks import StopOnSignal, TrainingProgressBar
from foldrank.train.evaluate import check_fits, evaluate_loss
from foldrank.train.health import Health
from foldrank.train.pretrain import InterruptedRunError
from foldrank.train.processes import peers_watched, shared_by
from foldrank.train.run_folder import save
from foldrank.train.run_log import RunLog, end_logged

DEFAULT_LENGTH = 512
"""Tokens of an example where a checkpoint does not say at which length it was trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A task made ready: the model, its examples, and how it is measured on those that are held out."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    training: Tokenized | Classified
    held_out: Tokenized | Classified
    labels: tuple[str, ...] | None
    length: int
    measure: Callable[[PreTrainedModel], dict[str, float]]


def finetune(
    checkpoint: Path,
    settings: FinetuneSettings,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    accept_changes: bool = False,
    tell: Callable[[str], None] = lambda _: None,
    quiet: bool = False,
) -> FinetuneMetrics:
    """Fine-tunes a checkpoint and saves one of the same kind: folded stays folded, dense stays dense.

    Args:
        checkpoint: of a language model, folded, unfolded or dense.
        settings: all of them.
        out: gets `finetune.yaml`, `log.jsonl`, `checkpoints/`, `model/` and, last, `metrics.json`.
        overwrite: replace the fine-tuning that `out` holds.
        resume: go on with the one in `out` from its newest checkpoint.
        accept_changes: let files of the checkpoint pass that are not as they were saved.
        tell: told what the user should know.
        quiet: show nothing while training.

    Raises:
        ValueError: for a checkpoint, data or settings that do not fit, and a loss that is not finite.
        FileExistsError: where `out` holds something and neither `overwrite` nor `resume` is given.
        InterruptedRunError: after SIGTERM, SIGINT or SIGHUP, with a checkpoint saved.
    """
    processes = shared_by(settings.device)
    folder = FinetuneFolder(out)
    with folder.claimed() if processes.is_main_process else nullcontext(), peers_watched():
        # Refuse what cannot work before anything is made or deleted.
        if not resume:
            folder.check_free(overwrite=overwrite)
        state = inspect(checkpoint).state
        rows = read_rows(settings)
        job = _prepare(checkpoint, settings, rows, accept_changes=accept_changes, tell=tell)
        identity = {"checkpoint_sha256": _identity(checkpoint), "data_sha256": rows.sha256}
        saved = folder.check_same(settings, identity) if resume else None

        # Measure, train, measure.
        job.model.to(processes.device)  # pyright: ignore[reportArgumentType]
        before = job.measure(job.model)
        if processes.is_main_process and not resume:
            folder.start(settings, checkpoint, identity)
        elif processes.is_main_process:
            folder.note_launch()
        with peers_watched(folder.path):
            processes.wait_for_everyone()
            model, figures = _train(job, settings, folder, saved, quiet=quiet)
        after = job.measure(model)

        # Save and record.
        metrics = FinetuneMetrics(
            task=settings.task,
            data=settings.data,
            data_sha256=rows.sha256,
            checkpoint=str(checkpoint),
            state=state,
            seed=settings.seed,
            training_examples=len(job.training.examples),
            held_out_examples=len(job.held_out.examples),
            held_out_tokens=job.held_out.tokens if isinstance(job.held_out, Tokenized) else None,
            cut=job.training.cut,
            left_out=job.training.left_out if isinstance(job.training, Tokenized) else 0,
            sequence_length=job.length,
            params=count_parameters(model),
            before=before,
            after=after,
            labels=job.labels,
            versions=versions(),
            commit=commit(),
            **figures,
        )
        if processes.is_main_process:
            save(model, job.tokenizer, folder.model)
            metrics.write(folder.metrics)
        return metrics


def _prepare(
    checkpoint: Path, settings: FinetuneSettings, rows: Rows, *, accept_changes: bool, tell: Callable[[str], None]
) -> Job:
    model, tokenizer = load(checkpoint, accept_changes=accept_changes, tell=tell)
    trained_at = getattr(model.config, "max_position_embeddings", None)
    length = settings.sequence_length or (min(trained_at, DEFAULT_LENGTH) if trained_at else DEFAULT_LENGTH)
    if told := check_fits(model, tokenizer, length):
        tell(told)
    batch_size, pad = settings.micro_batch_size, pad_token(tokenizer)
    if settings.task == "classification":
        labels = labels_of(rows.training, rows.held_out, rows.label_names)
        parts = [classify_rows(part, labels, tokenizer, length) for part in (rows.training, rows.held_out)]
        if cut := parts[0].cut:
            tell(f"{cut} of {len(rows.training)} training examples are longer than {length} tokens and were cut")
        del model  # checked, and loaded again with its new head
        model = load_classifier(checkpoint, labels.names, tokenizer, seed=settings.seed)
        return Job(
            model=model,
            tokenizer=tokenizer,
            training=parts[0],
            held_out=parts[1],
            labels=labels.names,
            length=length,
            measure=lambda tuned: scores(tuned, parts[1], pad, batch_size=batch_size),
        )
    if "messages" in rows.training[0] and set_chat_template_(tokenizer):
        tell("the tokenizer had no chat template: it got foldrank's, which is saved with it")
    training, held_out = (tokenize(part, tokenizer, settings, length) for part in (rows.training, rows.held_out))
    if training.cut:
        tell(f"{training.cut} of {len(rows.training)} training examples are longer than {length} tokens and were cut")
    if left_out := training.left_out + held_out.left_out:
        tell(f"{left_out} examples were left out: nothing of their answers is within {length} tokens")
    # By length, so that little is padded.
    sequences: Any = sorted(held_out.examples, key=lambda example: len(example["input_ids"]))

    def measure(tuned: PreTrainedModel) -> dict[str, float]:
        result = evaluate_loss(tuned, sequences, batch_size=batch_size, collate=partial(collate, pad))
        return {"loss": result.loss, "perplexity": result.perplexity}

    return Job(
        model=model,
        tokenizer=tokenizer,
        training=training,
        held_out=held_out,
        labels=None,
        length=length,
        measure=measure,
    )


def _train(
    job: Job, settings: FinetuneSettings, folder: FinetuneFolder, saved: Path | None, *, quiet: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The trained model, adapters merged, and what the training was."""
    classifies = settings.task == "classification"
    model: Any = job.model.train()
    if settings.lora_rank is not None:
        model = with_lora(model, settings.lora_rank, classifies=classifies)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    tokens = sum(len(example["input_ids"]) for example in job.training.examples) / len(job.training.examples)
    stop = StopOnSignal()
    shown = () if quiet else (TrainingProgressBar(tokens * settings.batch_size),)
    log = RunLog(folder.log, {"tokens_per_step": tokens * settings.batch_size})
    callbacks: list[Any] = [stop, Health(quiet=quiet), *shown, log]
    # What trainers set of special tokens and the cache is taken back, and that of the tokenizer is of a copy.
    generation, config = copy.deepcopy(getattr(job.model, "generation_config", None)), copy.deepcopy(job.model.config)
    trainer = make_trainer(model, job.training, copy.deepcopy(job.tokenizer), settings, folder.checkpoints, callbacks)
    began = time.perf_counter()
    with stop, end_logged(log, trainer), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's and TRL's own use of transformers
        trainer.train(resume_from_checkpoint=None if saved is None else str(saved))
        trainer.accelerator.wait_for_everyone()  # for the first one, which writes: a launcher kills what is left
        if stop.received is not None and trainer.state.global_step < trainer.state.max_steps:
            raise InterruptedRunError(
                stop.received,
                f"stopped by {stop.received.name} after step {trainer.state.global_step} of {trainer.state.max_steps}; "
                f"a checkpoint is saved: go on with --out {folder.path} --resume",
            )
    seconds = time.perf_counter() - began
    plain: Any = trainer.accelerator.unwrap_model(trainer.model)
    plain = merged(plain) if settings.lora_rank is not None else plain
    vars(plain).pop("forward", None)  # TRL's head, which computes the loss without logits
    if generation is not None:
        plain.generation_config = generation
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"):
        setattr(plain.config, name, getattr(config, name))
    return plain.eval(), {"steps": trainer.state.global_step, "seconds": seconds, "params_trained": trained}


def _identity(checkpoint: Path) -> str:
    """A hash of the weights' files."""
    known = read_checksums(checkpoint) or {}
    files = sorted(checkpoint.glob("*.safetensors"))
    return ",".join(str(known.get(file.name) or sha256_of_file(file)) for file in files)
