"""The settings of a recipe's training, each with its bounds and its meaning."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from foldrank.bounds import Bounds, out_of_bounds
from foldrank.core.config import STRICT
from foldrank.data.config import Layout, SequenceFormat

Checkpointing = Literal["block", "latents"]
"""What activation checkpointing keeps of a block: its input, or its input and latents (activation_checkpointing.py)."""

Compile = Literal["auto", "none", "blocks", "step"]
"""What torch.compile is given, see train/compilation.py."""

OptimizerName = Literal["adamw", "muon", "spectron"]
"""Of foldrank.optim: AdamW; Muon on the blocks' matrices; Spectron on the factors of low-rank layers."""

Sharding = Literal["none", "fsdp"]
"""Who holds the weights, gradients and optimizer state of a run on several processes."""

Schedule = Literal["cosine", "wsd", "constant"]
"""How the learning rate goes along a run, see train/schedule.py."""

Ablation = Literal["folded", "scaled", "random", "orthogonal"]
"""Starts that stand in for the residual, see train/ablations.py."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Optimization: an optimizer, its learning rate along the run, and what is kept and computed on the way.

    Raises:
        ValueError: naming every field that is out of range.
    """

    __pydantic_config__ = STRICT

    steps: Annotated[int, Bounds(1, 10**9)] = 300
    """Optimizer steps."""

    batch_size: Annotated[int, Bounds(1, 1 << 17)] = 16
    """Sequences per optimizer step, over all processes and accumulation steps."""

    micro_batch_size: Annotated[int | None, Bounds(1, 1 << 17)] = None
    """Sequences per forward pass and process, at most; None: as many as the device's memory holds, by the plan."""

    activation_checkpointing: Checkpointing | None = None
    """What each block keeps for the backward pass, which computes the rest again: block, its input alone: least memory,
    most time; latents, its input and the latents of its low-rank layers; None: everything."""

    chunked_loss: bool | None = None
    """Compute head and loss by chunks of tokens (fused linear cross-entropy): the same loss, without the logits of a
    whole batch in memory, the largest thing there where the vocabulary is large and the model small; None: where these
    would take more than an eighth of the device's memory."""

    compile: Compile = "auto"
    """What torch.compile compiles: none; blocks, one block once for all; step, the whole forward and backward pass, in
    CUDA graphs; auto: blocks on a GPU, none on a CPU."""

    sharding: Sharding = "none"
    """Of several processes, none: each holds the whole model (DDP); fsdp: each holds its share of weights, gradients
    and optimizer state, gathered block by block where they are needed (FSDP2)."""

    tensor_parallel: Annotated[int, Bounds(1, 1 << 10)] = 1
    """Processes that share the layers of each block, the rank never split: all of them see the same sequences. With
    sharding fsdp there may be several such groups, among which their parts are shared out."""

    split_stream: bool = False
    """With tensor_parallel, split also what goes from block to block, so that each process holds its part of both
    factors of all layers, for twice the numbers that are summed."""

    skip_nonfinite: Annotated[int, Bounds(1, 1000)] | None = None
    """Steps in a row that are left out where their gradient is not finite, before the run ends; None: it ends at the
    first. Reading each norm at once costs an accelerator a wait a step."""

    patience: Annotated[float, Bounds(1, 10**6)] = 600.0
    """Seconds that a process waits for another one before the run ends with an error."""

    sequence_length: Annotated[int, Bounds(2, 1 << 20)] = 256
    """Tokens per sequence."""

    layout: Layout = "packed"
    """packed: documents joined and cut into sequences; best-fit: whole documents, as many to a sequence as fit, longer
    ones cut; padded: each document cut or padded to one, as in the published protocol."""

    document_mask: bool = False
    """Keep the documents of a sequence apart: no attention across, positions that begin anew, and no document predicted
    from the one before (docs/data.md)."""

    optimizer: OptimizerName = "adamw"
    """adamw; muon, orthogonalized momentum on the blocks' matrices and AdamW on all else, with one learning rate;
    spectron, the same on both factors of a low-rank layer with a step that they share (foldrank.optim)."""

    newton_schulz_dtype: Literal["float32", "bfloat16"] | None = None
    """In what muon and spectron orthogonalize: bfloat16 is faster on devices that multiply in it, and makes equal runs
    part by 1e-4; None: in the gradients' dtype, at least float32."""

    learning_rate: Annotated[float, Bounds(0, 100, above=True)] = 0.006
    """Peak learning rate."""

    schedule: Schedule = "cosine"
    """cosine, down to the last step; wsd, stable until it decays at the end: a run can go on from any stable step to
    another end; constant, after the warm-up."""

    min_learning_rate_ratio: float = 0.1
    """Last learning rate over the peak, of cosine and wsd."""

    warmup_ratio: float = 0.1
    """Share of the steps that is linear warm-up."""

    warmup_steps: Annotated[int | None, Bounds(0, 10**9)] = None
    """Steps of linear warm-up; None: by warmup_ratio."""

    decay_ratio: Annotated[float, Bounds(0, 1, above=True)] = 0.2
    """Share of the steps, at the end, in which wsd decays."""

    weight_decay: Annotated[float, Bounds(0, 100)] = 0.01
    """AdamW's decoupled decay, on matrices alone."""

    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's running averages."""

    max_grad_norm: Annotated[float, Bounds(0, 10**6, above=True)] = 0.5
    """Gradients are clipped to this norm."""

    fold_at_start: bool = False
    """Fold before the first step and let the weight decay pull towards the residual instead of 0: the same training by
    the graph of plain low rank, each checkpoint of which can be deployed as it is."""

    ablation: Ablation | None = None
    """An ablation, for studies: take the residual away and start each up-projection with the norm that it
    would give: folded, scaled, random or orthogonal (train/ablations.py)."""

    eval_every: Annotated[int, Bounds(1, 10**9)] = 75
    """Steps between evaluations."""

    save_every: Annotated[int, Bounds(1, 10**9)] = 100
    """Steps between checkpoints from which an interrupted run goes on."""

    keep_checkpoints: Annotated[int, Bounds(1, 10**6)] = 2
    """How many of the newest checkpoints stay."""

    log_every: Annotated[int, Bounds(1, 10**9)] = 1
    """Steps between log entries."""

    report_to: Sequence[str] = ()
    """Further logs, through Trainer's own integrations: tensorboard, trackio, wandb; all: each that is installed."""

    loader_workers: Annotated[int, Bounds(0, 256)] = 0
    """Processes that read the data; 0: the training process itself."""

    eval_tokens: Annotated[int | None, Bounds(1, 10**15)] = None
    """Validation tokens per evaluation; None: the whole split."""

    test_tokens: Annotated[int | None, Bounds(1, 10**15)] = None
    """Held-out tokens behind those of `eval_tokens`, on which the folded model is measured once, at the end; None: no
    such test."""

    dtype: str = "float32"
    """float32, whose products are in TF32 on a GPU that has it; or bfloat16 for autocast over float32 weights."""

    device: str = "auto"
    """cpu, or auto: an accelerator where there is one."""

    peak_flops: Annotated[float | None, Bounds(0, 1e18, above=True)] = None
    """FLOP/s that one device can reach, of which the utilization (MFU) is a share; None: of the GPUs in
    train/utilization.py, theirs, and for others no utilization."""

    def __post_init__(self) -> None:
        problems = out_of_bounds(self)
        if self.test_tokens is not None and self.eval_tokens is None:
            problems.append("test_tokens needs eval_tokens: without, the validation takes all that is held out")
        if self.ablation is not None and self.spreads:
            problems.append("ablation is for studies in one process: leave out sharding and tensor_parallel")
        if self.ablation is not None and self.fold_at_start:
            problems.append("ablation and fold_at_start both take the residual away: give one of them")
        if not 0 <= self.warmup_ratio < 1:
            problems.append(f"warmup_ratio must lie in [0, 1), got {self.warmup_ratio}")
        if self.warmup_steps is not None and self.warmup_steps > self.steps:
            problems.append(f"warmup_steps must be at most steps {self.steps}, got {self.warmup_steps}")
        if self.schedule == "wsd" and not problems:
            warmup = self.warmup_ratio if self.warmup_steps is None else self.warmup_steps / self.steps
            if warmup + self.decay_ratio > 1:
                problems.append(
                    f"warm-up and decay of wsd take {warmup + self.decay_ratio:.3g} of the steps: lower decay_ratio "
                    f"{self.decay_ratio}, or warm up for less"
                )
        if self.document_mask and self.layout == "padded":
            problems.append("document_mask has nothing to keep apart in the padded layout, of one document a sequence")
        if self.dtype not in ("float32", "bfloat16"):
            problems.append(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        if self.device not in ("auto", "cpu"):
            problems.append(f"device must be auto or cpu, got {self.device!r}")
        if not 0 <= self.min_learning_rate_ratio <= 1:
            problems.append(f"min_learning_rate_ratio must lie in [0, 1], got {self.min_learning_rate_ratio}")
        if not all(0 <= beta < 1 for beta in self.betas):
            problems.append(f"betas must lie in [0, 1), got {self.betas}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def sequences(self) -> SequenceFormat:
        """What documents become."""
        return SequenceFormat(length=self.sequence_length, layout=self.layout, document_mask=self.document_mask)

    @property
    def spreads(self) -> bool:
        """Whether each process holds a share or a part of the model alone."""
        return self.sharding == "fsdp" or self.tensor_parallel > 1

    def resolve_micro_batch_size(self, processes: int = 1) -> int:
        """Sequences that each of `processes` takes in one forward pass: the most that `micro_batch_size` allows.

        Raises:
            ValueError: where a step's sequences cannot be shared out evenly.
        """
        return micro_batch_size(self.batch_size, self.micro_batch_size, processes)


def micro_batch_size(batch_size: int, limit: int | None, processes: int) -> int:
    """Examples that each process takes in one forward pass: the most up to `limit` by which its share of a step goes.

    Raises:
        ValueError: where a step's examples cannot be shared out evenly.
    """
    if processes < 1 or batch_size % processes:
        raise ValueError(
            f"batch_size {batch_size} cannot be shared out evenly among {processes} processes: take a number that "
            "divides it, or another batch_size"
        )
    batch = batch_size // processes
    return next(count for count in range(min(limit or batch, batch), 0, -1) if batch % count == 0)
