"""`Trainer` as a pre-training run needs it: our order of data, our perplexity, checkpoints that are whole or absent."""

import os
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.utils.import_utils import is_torch_tf32_available

from foldrank.core.anchored_decay import AnchoredDecay
from foldrank.data.order import MixedDataset, ShuffledDataset
from foldrank.data.stream import PackedStream
from foldrank.optim import factor_optimizer
from foldrank.recipes.schema import Recipe
from foldrank.recipes.train_config import OptimizerName
from foldrank.train.block_costs import widths
from foldrank.train.checkpoints import checkpoints, step_of
from foldrank.train.device_memory import peak_memory
from foldrank.train.evaluate import by_source, evaluate_loss
from foldrank.train.safe_checkpoints import DivergedError
from foldrank.train.schedule import scheduler_arguments
from foldrank.train.sharded_checkpoints import ShardedCheckpoints
from foldrank.train.sharding import share_of

PROJECT = "foldrank"
"""What trackers file a run under."""


class PretrainTrainer(ShardedCheckpoints):
    """Trains on the sequences of a dataset or a stream as they come, and evaluates by tokens.

    Raises:
        ValueError: from `train`, where a loss is not finite; no checkpoint is written after that step.
        OSError: from `train`, where a checkpoint cannot be written; the ones before it stay whole.
    """

    def __init__(
        self,
        *,
        train_dataset: ShuffledDataset | MixedDataset | PackedStream,
        eval_dataset: Dataset,
        decay: AnchoredDecay | None = None,
        optimizer: OptimizerName = "adamw",
        newton_schulz_dtype: str | None = None,
        skip_nonfinite: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self.share, self.shares = share_of(self.model)
        self.sequences = train_dataset
        self.validation = eval_dataset
        self.decay = decay
        self.optimizer_name = optimizer
        self.newton_schulz_dtype = newton_schulz_dtype
        self.evaluation_seconds = 0.0
        self.began = 0.0
        self.ended: float | None = None
        self.peak_memory: int | None = None
        """Bytes that were allocated on a GPU at most, while training; None on a CPU."""
        self.resumed = False
        self.seconds_at: dict[int, float] = {}
        self.architecture: Any = self.accelerator.unwrap_model(self.model).config
        self.skip_nonfinite = skip_nonfinite
        self.skipped: list[int] = []
        """Steps that were left out since the last log entry."""
        self._skipped_in_a_row = 0
        self._unchecked: list[tuple[int, str, Tensor]] = []

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`, by the clock."""
        if self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.began, self.resumed = time.perf_counter(), bool(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_seconds(self) -> float:
        """Time since the training began, or went on, until it ended; without evaluations."""
        return (self.ended or time.perf_counter()) - self.began - self.evaluation_seconds

    def stop_the_clock(self) -> None:
        """What comes from now on is no training."""
        self.ended = time.perf_counter()
        if self.args.device.type == "cuda":
            self.peak_memory = torch.cuda.max_memory_allocated()

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`; processes among which layers are split all get the same sequences."""
        if self.get_tp_size() == 1:
            return super().get_train_dataloader()
        loader = DataLoader(
            self.sequences,
            batch_size=self.args.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return prepare_data_loader(
            loader,
            self.args.device,
            num_processes=self.shares,
            process_index=self.share,
            put_on_device=True,
            dispatch_batches=False,  # of a stream the first process would hand each another batch
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:  # noqa: ARG002
        assert not isinstance(self.sequences, PackedStream)  # a stream is asked for no sampler
        return SequentialSampler(self.sequences)

    def get_decay_parameter_names(self, model: nn.Module, **_: Any) -> list[str]:
        """Weight decay is for matrices: not for norms, biases or a trainable alpha."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """As in `Trainer`; the decay of a model that was folded at the start goes along."""
        made = self.optimizer is None
        if made and self.optimizer_name != "adamw":
            assert isinstance(self.model, nn.Module)
            self.optimizer = factor_optimizer(
                self.model,
                self.optimizer_name,
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                iterates_in=self.newton_schulz_dtype,
            )
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and self.decay is not None:
            self.decay.attach(optimizer)
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in `Trainer`; the loss is kept, to be checked when reading it stalls no accelerator."""
        with flash_attention(self.architecture, self.args):
            loss = super().training_step(*args, **kwargs)
        # A copy, since the next replay of a CUDA graph writes where this one wrote.
        self._unchecked.append((self.state.global_step + 1, "loss", loss.detach().clone()))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm: Any = super()._get_grad_norm(model, grad_norm)
        step = self.state.global_step + 1
        if self.skip_nonfinite is None:
            self._unchecked.append((step, "gradient norm", norm.detach().clone()))
        elif torch.isfinite(norm):
            self._skipped_in_a_row = 0
        else:
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row <= self.skip_nonfinite:
                model.zero_grad(set_to_none=True)  # of what has none the optimizer changes nothing
                self.skipped.append(step)
                self._unchecked = [each for each in self._unchecked if each[0] != step]
            else:
                self._unchecked.append((step, "gradient norm", norm.detach().clone()))
                self._check_finite()
        return norm

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`, which reads the losses for it anyway: they are checked first. With the seconds of training
        so far and the peak of memory; of a mixture also the tokens of each source.
        """
        self._check_finite()
        if "loss" in logs:
            logs |= {"seconds": round(self.training_seconds(), 3), "peak_memory_bytes": peak_memory(self.args.device)}
            if self.skipped:
                logs["skipped_steps"] = len(self.skipped)
                self.skipped.clear()
        if isinstance(self.sequences, MixedDataset) and "loss" in logs:
            tokens = self.sequences.tokens_by_source(self.state.global_step * self.sequences_per_step)
            logs |= {f"tokens/{name}": count for name, count in tokens.items()}
        super().log(logs, *args, **kwargs)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss and perplexity of the validation sequences, weighted by tokens."""
        began = time.perf_counter()
        if not self.resumed:
            self.seconds_at[self.state.global_step] = self.training_seconds()
        assert isinstance(self.model, nn.Module)
        result = evaluate_loss(self.model, self.validation, batch_size=self.args.eval_batch_size)
        metrics = {"eval_loss": result.loss, "eval_perplexity": result.perplexity}
        metrics |= {f"eval_loss/{name}": part.loss for name, part in by_source(result, self.validation).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.evaluation_seconds += time.perf_counter() - began
        return metrics

    @property
    def sequences_per_step(self) -> int:
        """Over all processes and accumulation steps."""
        of_a_process = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return of_a_process * self.args.world_size // self.get_tp_size()

    def get_tp_size(self) -> int:
        """Processes that see the same sequences."""
        return self.args.world_size // self.shares

    def _check_finite(self) -> None:
        bad = [(step, what, value) for step, what, value in self._unchecked if not torch.isfinite(value)]
        self._unchecked.clear()
        if not bad:
            return
        step, what, value = bad[0]
        size, saved = self.sequences_per_step, checkpoints(Path(str(self.args.output_dir)))
        good = [each for each in saved if step_of(each) < step]
        skip = "" if self.skip_nonfinite else ", or train.skip_nonfinite: N to leave out up to N such steps in a row"
        raise DivergedError(
            f"the {what} of step {step} is {float(value)}; its batch is sequences {(step - 1) * size} to "
            f"{step * size - 1} of the training order. "
            f"{f'The last good checkpoint is {good[-1].name}' if good else 'There is no checkpoint before it'}. Try a "
            f"lower train.learning_rate, a longer train.warmup_ratio or a smaller train.max_grad_norm{skip}"
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_finite()
        super()._save_checkpoint(model, trial)


def flash_attention(config: Any, arguments: TrainingArguments) -> AbstractContextManager[Any]:
    """Lets SDPA take its flash kernel alone where it can, so that a slower one is an error and no surprise.

    Ours need no mask: attention is causal, and padding stands at the end. Models with a sliding window have one, which
    the kernel of a CPU takes, but no dropout. On a GPU it wants bfloat16, an even eighth of at most 256 numbers a head,
    and compute capability 8.0 (PyTorch, `sdp_utils`).
    """
    dropout = getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0)
    able = arguments.device.type == "cpu" and not dropout
    if arguments.device.type == "cuda" and getattr(config, "sliding_window", None) is None:
        n = widths(config)
        head_size = n.q // n.heads
        able = arguments.bf16 and head_size % 8 == 0 and head_size <= 256
        able = able and torch.cuda.get_device_capability(arguments.device) >= (8, 0)
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if able else nullcontext()


def training_arguments(recipe: Recipe, out: Path) -> TrainingArguments:
    """The recipe in `Trainer`'s terms. Activation checkpointing is not among them: the model has it (`build_model`)."""
    train = recipe.train
    known = get_available_reporting_integrations() if train.report_to else []  # it imports each of them
    if missing := [name for name in train.report_to if name not in (*known, "all")]:
        raise ValueError(
            f"train.report_to: {missing[0]!r} is not installed (pip install 'foldrank[trackers]'); "
            f"here there are: {', '.join(known) or 'none'}"
        )
    if train.report_to:
        os.environ.setdefault("WANDB_PROJECT", PROJECT)  # it takes it from nowhere else
    on_accelerator = torch.accelerator.is_available() and train.device != "cpu"
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=train.steps,
        learning_rate=train.learning_rate,
        **scheduler_arguments(train),
        weight_decay=train.weight_decay,
        adam_beta1=train.betas[0],
        adam_beta2=train.betas[1],
        max_grad_norm=train.max_grad_norm,
        eval_strategy="steps",
        eval_steps=train.eval_every,
        logging_steps=train.log_every,
        logging_nan_inf_filter=train.skip_nonfinite is not None,
        save_strategy="steps",
        save_steps=train.save_every,
        bf16=train.dtype == "bfloat16",
        use_cpu=not on_accelerator,  # or bfloat16 would want an accelerator
        seed=recipe.seed,
        report_to=known if "all" in train.report_to else list(train.report_to),
        project=PROJECT,
        run_name=f"{out.absolute().name}-seed{recipe.seed}",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=train.loader_workers,
        dataloader_pin_memory=on_accelerator,
        accelerator_config={"non_blocking": on_accelerator},  # copies run beside the step before
        optim="adamw_torch_fused",
        tf32=True if train.dtype == "float32" and on_accelerator and is_torch_tf32_available() else None,
    )
    devices = arguments.world_size // train.tensor_parallel * max(1, arguments.n_gpu)
    micro_batch = train.resolve_micro_batch_size(devices)
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = micro_batch
    arguments.gradient_accumulation_steps = train.batch_size // (devices * micro_batch)
    return arguments
