"""What a finished run measured: `metrics.json`, from the model, its trainer and the fold."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from foldrank.core.fold import FoldReport
from foldrank.core.inventory import count_parameters
from foldrank.data.order import MixedDataset
from foldrank.provenance import commit, versions
from foldrank.recipes.schema import Recipe
from foldrank.train.accounting import memory, parameters
from foldrank.train.checkpoints import step_of
from foldrank.train.effective_rank import effective_rank
from foldrank.train.evaluate import Evaluation, FoldError, by_source, continue_text
from foldrank.train.inputs import RunInputs
from foldrank.train.metrics import EvaluationPoint, RunMetrics
from foldrank.train.model import dense_parameters
from foldrank.train.spectra import spectra
from foldrank.train.trainer import PretrainTrainer
from foldrank.train.utilization import Utilization

WIDEST = 1024
"""Smaller side of a dense matrix of which a run computes the effective rank: above, it takes seconds a layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Folded:
    """What came of the fold."""

    report: FoldReport
    error: FoldError
    before: Evaluation
    after: Evaluation
    test: Evaluation | None


def measured(
    recipe: Recipe,
    name: str,
    model: PreTrainedModel,
    inputs: RunInputs,
    trainer: PretrainTrainer,
    start: tuple[float | None, float | None],
    folded: Folded,
    checkpoint: Path | None,
    lineage: Sequence[str],
) -> RunMetrics:
    """The metrics of a run whose trainer has ended.

    Args:
        recipe: all settings, with what it left open chosen.
        name: what the metrics call the recipe.
        model: trained and folded.
        inputs: what it was trained and evaluated on.
        trainer: that trained it.
        start: losses of the first batch with the residual and without.
        folded: what came of the fold.
        checkpoint: from which the run went on; None: from its start.
        lineage: what it began with, where it began with other weights.
    """
    train, vocab_size = recipe.train, model.config.vocab_size
    utilization = Utilization.of(recipe, trainer.args, vocab_size)
    tokens, started_at = inputs.training.num_tokens(), 0 if checkpoint is None else step_of(checkpoint)
    seconds, test, parts = trainer.training_seconds(), folded.test, parameters(model)
    return RunMetrics(
        recipe=name,
        seed=recipe.seed,
        params=count_parameters(model),
        params_blocks=parts.attention + parts.mlp,
        params_dense=dense_parameters(recipe, vocab_size),
        steps=train.steps,
        tokens=tokens,
        flops_per_token=utilization.flops_per_token,
        flops=utilization.flops_per_step * train.steps,
        memory_bytes=memory(recipe, gpus=utilization.shares, vocab_size=vocab_size).parts(),
        tokens_by_source=_tokens_by_source(inputs),
        train_tokens_available=inputs.identity.train_tokens,
        text_sha256=inputs.identity.text_sha256,
        tokenizer_sha256=inputs.identity.tokenizer_sha256,
        lineage=lineage,
        resumed_at_step=started_at,
        seconds=seconds,
        tokens_per_second=(train.steps - started_at) * tokens / train.steps / seconds,
        start_loss=start[0],
        start_loss_without_residual=start[1],
        micro_batch_size=train.micro_batch_size,
        mfu=utilization.of_steps(train.steps - started_at, seconds),
        peak_flops=utilization.peak_flops,
        peak_memory_bytes=trainer.peak_memory,
        val_tokens=folded.before.tokens,
        val_loss=folded.before.loss,
        val_perplexity=folded.before.perplexity,
        val_loss_folded=folded.after.loss,
        val_perplexity_folded=folded.after.perplexity,
        val_loss_by_source={name: part.loss for name, part in by_source(folded.after, inputs.validation).items()},
        test_tokens=None if test is None else test.tokens,
        test_loss=None if test is None else test.loss,
        test_perplexity=None if test is None else test.perplexity,
        folded_layers=len(folded.report.errors),
        fold_max_abs_weight_rounding=folded.report.max_abs_error,
        fold_weight_rounding=dict(folded.report.errors),
        effective_ranks={
            f"{model.base_model_prefix}.{name}": effective_rank(values)
            for name, values in spectra(model, WIDEST).items()
        },
        fold_max_abs_logit_drift=folded.error.max_abs_error,
        fold_argmax_agreement=folded.error.argmax_agreement,
        history=_history(trainer, tokens / train.steps),
        sample=continue_text(
            model, inputs.tokenizer, recipe.sample_prompt, seed=recipe.seed, max_new_tokens=recipe.sample_tokens
        ),
        device=str(model.device),
        threads=torch.get_num_threads(),
        versions=versions(),
        commit=commit(),
    )


def _tokens_by_source(inputs: RunInputs) -> dict[str, int]:
    training = inputs.training
    return training.tokens_by_source(len(training)) if isinstance(training, MixedDataset) else {}


def _history(trainer: PretrainTrainer, tokens_per_step: float) -> tuple[EvaluationPoint, ...]:
    points, losses = [], []
    for entry in trainer.state.log_history:
        if "loss" in entry:
            losses.append(entry["loss"])
        if "eval_loss" in entry:
            points.append(
                EvaluationPoint(
                    step=int(entry["step"]),
                    tokens=round(entry["step"] * tokens_per_step),
                    seconds=trainer.seconds_at.get(int(entry["step"])),
                    train_loss=sum(losses) / len(losses) if losses else None,
                    val_loss=entry["eval_loss"],
                )
            )
            losses = []
    return tuple(points)
