"""The trainers of fine-tuning: TRL's for language, transformers' for classification, with whole checkpoints."""

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from foldrank.data.tokenizer import pad_token
from foldrank.extras import needed
from foldrank.finetune.classification import Classified, collate
from foldrank.finetune.language import Tokenized
from foldrank.finetune.settings import FinetuneSettings
from foldrank.optim import factor_optimizer
from foldrank.recipes.train_config import micro_batch_size
from foldrank.train.processes import shared_by
from foldrank.train.safe_checkpoints import DivergedError, SafeCheckpoints


class StopAtNaN(TrainerCallback):
    """Ends a training whose loss is not finite.

    Raises:
        ValueError: from the training.
    """

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:  # noqa: ARG002
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise DivergedError(
                f"the loss of step {state.global_step} is {loss}: the checkpoints before it are good. Try a lower "
                "learning_rate or a smaller max_grad_norm"
            )


def make_trainer(
    model: Any,
    examples: Tokenized | Classified,
    tokenizer: PreTrainedTokenizerBase,
    settings: FinetuneSettings,
    out: Path,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """The trainer of a model, which has adapters or none.

    Raises:
        ValueError: where a package is missing, or a step's examples cannot be shared out evenly.
    """
    pad = pad_token(tokenizer)
    common: dict[str, Any] = {
        "model": model,
        "callbacks": [StopAtNaN(), *callbacks],
        "optimizers": (_optimizer(model, settings), None),
        "keep_checkpoints": settings.keep_checkpoints,
        "tokenizer": tokenizer,
    }
    if isinstance(examples, Classified):
        trainer: Any = _ClassificationTrainer(
            args=TrainingArguments(**_arguments(settings, out), remove_unused_columns=False),
            train_dataset=list(examples.examples),  # pyright: ignore[reportArgumentType]
            data_collator=lambda batch: collate(pad, batch),
            **common,
        )
    else:
        trl = needed("trl", "task language", extra="finetune")
        datasets = needed("datasets", "task language", extra="finetune")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TRL's own default goes by a name that transformers left
            arguments = trl.SFTConfig(**_arguments(settings, out), max_length=None, gradient_checkpointing=False)
        # They are token ids with labels already, which TRL takes as they are.
        trainer = _language_trainer(trl)(
            args=arguments,
            train_dataset=datasets.Dataset.from_list(list(examples.examples)),
            processing_class=tokenizer,
            **common,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _ClassificationTrainer(SafeCheckpoints, Trainer):
    """Trainer's own loss, the mean over a micro-batch, and of these over a step.

    Trainer takes the classes of transformers' generic heads, whose forward pass takes any keyword, for ones that divide
    by the examples of the whole step, which they do not: it would sum the means.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = False


def _language_trainer(trl: Any) -> Any:
    return type("LanguageTrainer", (SafeCheckpoints, trl.SFTTrainer), {})


def _optimizer(model: PreTrainedModel, settings: FinetuneSettings) -> torch.optim.Optimizer | None:
    """None where it is Trainer's AdamW."""
    if settings.optimizer == "adamw":
        return None
    return factor_optimizer(
        model, settings.optimizer, lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.999)
    )


def _arguments(settings: FinetuneSettings, out: Path) -> dict[str, Any]:
    on_accelerator = torch.accelerator.is_available() and settings.device != "cpu"
    processes = shared_by(settings.device).num_processes
    micro = micro_batch_size(settings.batch_size, settings.micro_batch_size, processes)
    return {
        "output_dir": str(out),
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": settings.batch_size // (processes * micro),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": settings.warmup_ratio,  # below 1 it is a share
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "logging_steps": settings.log_every,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": settings.save_every,
        "bf16": settings.dtype == "bfloat16",
        "use_cpu": not on_accelerator,
        "seed": settings.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": on_accelerator,
        "optim": "adamw_torch_fused",
    }
