"""The main job, from text to a folded checkpoint: read `pretrain` from top to bottom."""

import json
import platform
import shutil
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments

from foldrank.data.blocks import TrainingOrder
from foldrank.data.prepare import Progress, prepared
from foldrank.fold import fold_
from foldrank.train.callbacks import JsonLines, ProgressReport
from foldrank.train.evaluate import continue_text, drift, evaluate_loss, first, logits_of
from foldrank.train.model import build_model, dense_parameters
from foldrank.train.recipe import Recipe
from foldrank.tree import count_parameters

SCHEMA = 1
"""Version of config.yaml and metrics.json."""

DRIFT_SEQUENCES = 32
"""Validation sequences on which the fold is verified."""


def pretrain(
    recipe: Recipe, out: Path, *, name: str = "custom", overwrite: bool = False, progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Trains a recipe's model, folds it, verifies the fold, and saves what is deployed.

    Args:
        recipe: all settings.
        out: the run's folder. Gets `config.yaml`, `log.jsonl`, `unfolded/` (the trained weights), `folded/` (the
            deployed checkpoint with its tokenizer) and, last, `metrics.json`.
        name: what the metrics call the recipe.
        overwrite: replace what `out` holds.
        progress: told how far the preparation of the data is.

    Returns:
        What `metrics.json` holds.

    Raises:
        ValueError: for settings that do not fit, and text too short for them.
        FileExistsError: where `out` holds something and `overwrite` is off.
    """
    check_free(out, overwrite=overwrite)
    data = prepared(recipe.data, progress)
    tokenizer = data.tokenizer()
    train = recipe.train
    training = TrainingOrder(
        data.blocks("train", train.sequence_length), recipe.seed, num_sequences=train.steps * train.batch_size
    )
    validation_count = train.eval_tokens and max(1, train.eval_tokens // train.sequence_length)
    validation = first(data.blocks("validation", train.sequence_length), validation_count)
    model = build_model(
        recipe, len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )

    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    save_config(recipe, name, out / "config.yaml")
    trainer = PretrainTrainer(
        model=model,
        args=training_arguments(recipe, out),
        train_dataset=training,
        eval_dataset=validation,
        callbacks=[ProgressReport(train.batch_size * train.sequence_length), JsonLines(out / "log.jsonl")],
    )
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began - trainer.evaluation_seconds

    model.config.use_cache = True
    unfolded = evaluate_loss(model, validation)
    verified_on = first(validation, DRIFT_SEQUENCES)
    logits_before = logits_of(model, verified_on)
    save(model, tokenizer, out / "unfolded")
    fold_report = fold_(model)
    changed = drift(logits_before, logits_of(model, verified_on))
    folded = evaluate_loss(model, validation)
    save(model, tokenizer, out / "folded")

    tokens = train.steps * train.batch_size * train.sequence_length
    metrics = {
        "schema": SCHEMA,
        "recipe": name,
        "seed": recipe.seed,
        "params": count_parameters(model),
        "params_dense": dense_parameters(recipe, len(tokenizer)),
        "steps": train.steps,
        "tokens": tokens,
        "train_tokens_available": data.tokens("train"),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "val_tokens": unfolded.tokens,
        "val_loss": unfolded.loss,
        "val_perplexity": unfolded.perplexity,
        "val_loss_folded": folded.loss,
        "val_perplexity_folded": folded.perplexity,
        "folded_layers": len(fold_report.drift),
        "fold_max_abs_weight_rounding": fold_report.max_drift,
        "fold_max_abs_logit_drift": changed.max_abs_logit,
        "fold_argmax_agreement": changed.argmax_agreement,
        "history": history(trainer),
        "sample": continue_text(model, tokenizer, recipe.sample_prompt, seed=recipe.seed),
        "device": str(model.device),
        "versions": versions(),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


class PretrainTrainer(Trainer):
    """`Trainer` with our order of the data, our perplexity, and weight decay on matrices alone."""

    def __init__(
        self, *, model: PreTrainedModel, train_dataset: TrainingOrder, eval_dataset: Dataset, **kwargs: Any
    ) -> None:
        super().__init__(model=model, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self.sequences = train_dataset
        self.validation = eval_dataset
        self.evaluation_seconds = 0.0

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:  # noqa: ARG002
        # The dataset is already in its order (TrainingOrder).
        return SequentialSampler(self.sequences)

    def get_decay_parameter_names(self, model: nn.Module, **_: Any) -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        began = time.perf_counter()
        assert isinstance(self.model, nn.Module)
        result = evaluate_loss(self.model, self.validation, batch_size=self.args.eval_batch_size)
        metrics = {"eval_loss": result.loss, "eval_perplexity": result.perplexity}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.evaluation_seconds += time.perf_counter() - began
        return metrics


def training_arguments(recipe: Recipe, out: Path) -> TrainingArguments:
    """The recipe in `Trainer`'s terms."""
    train = recipe.train
    micro_batch = train.micro_batch_size or train.batch_size
    return TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=train.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=train.batch_size // micro_batch,
        per_device_eval_batch_size=micro_batch,
        learning_rate=train.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": train.min_learning_rate_ratio},
        warmup_steps=round(train.warmup_ratio * train.steps),
        weight_decay=train.weight_decay,
        adam_beta1=train.betas[0],
        adam_beta2=train.betas[1],
        max_grad_norm=train.max_grad_norm,
        eval_strategy="steps",
        eval_steps=train.eval_every,
        logging_steps=1 if train.steps <= 1000 else 10,
        logging_nan_inf_filter=False,
        save_strategy="no",
        bf16=train.dtype == "bfloat16",
        use_cpu=train.device == "cpu",
        seed=recipe.seed,
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )


def check_free(out: Path, *, overwrite: bool) -> None:
    """Refuses a folder that holds something, saying what.

    Raises:
        FileExistsError: naming the run that the folder holds.
    """
    if overwrite or not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    what = "is not empty"
    if (out / "metrics.json").exists():
        metrics = json.loads((out / "metrics.json").read_text())
        what = (
            f"holds a finished run (recipe {metrics['recipe']}, seed {metrics['seed']}, {metrics['steps']} steps, "
            f"validation perplexity {metrics['val_perplexity_folded']:.2f})"
        )
    elif (out / "config.yaml").exists():
        what = "holds a run that did not finish"
    raise FileExistsError(f"{out} {what}: choose another folder with --out, or replace it with --overwrite")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Model and tokenizer in the Hugging Face format."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_config(recipe: Recipe, name: str, file: Path) -> None:
    """The resolved settings, as a recipe that can be run again, with what they ran on."""
    about = {"schema": SCHEMA, "recipe": name, "versions": versions(), "commit": commit()}
    file.write_text(yaml.safe_dump({"run": about, **recipe.to_dict()}, sort_keys=False))


def history(trainer: Trainer) -> list[dict[str, Any]]:
    """Training loss (mean since the evaluation before) and validation loss at each evaluation."""
    rows, losses = [], []
    for entry in trainer.state.log_history:
        if "loss" in entry:
            losses.append(entry["loss"])
        if "eval_loss" in entry:
            mean = sum(losses) / len(losses) if losses else None
            rows.append({"step": entry["step"], "train_loss": mean, "val_loss": entry["eval_loss"]})
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
