"""A `Trainer` whose checkpoints are whole or absent, hold no NaN, and are ready to deploy."""

import errno
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedTokenizerBase, Trainer

from foldrank.core.dtensor import to_local
from foldrank.core.finite import all_finite
from foldrank.hf.checksums import write_checksums
from foldrank.train.checkpoints import PARTIAL, checkpoints, commit_checkpoint
from foldrank.train.processes import agreement


class DivergedError(ValueError):
    """A loss or weights that are not finite."""


@contextmanager
def as_deployed(config: Any) -> Iterator[None]:
    """Lets a model's config have the cache that training turns off."""
    config.use_cache, training = True, config.use_cache
    try:
        yield
    finally:
        config.use_cache = training


class SafeCheckpoints(Trainer):
    """Mixed into a trainer: writes a checkpoint beside the others, checks it, and gives it its name when it is whole.

    Args:
        keep_checkpoints: the newest so many are kept.
        always_keep: steps whose checkpoints are kept as well.
        tokenizer: saved with each; not `processing_class`, which would pad, and set tokens of the model.
        run_id: written into each.
        kwargs: as of `Trainer`.

    Raises:
        ValueError: from `train`, where a weight is not finite; no checkpoint is written after that step.
        OSError: from `train`, where a checkpoint cannot be written; the ones before it stay whole.
    """

    def __init__(
        self,
        *,
        keep_checkpoints: int,
        always_keep: Collection[int] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        run_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.keep_checkpoints = keep_checkpoints
        self.always_keep = always_keep
        self.run_id = run_id
        self.tokenizer = tokenizer
        self._largest = agreement()  # now, since a launcher that is gone helps to make no further group

    def _check_weights(self, model: nn.Module) -> None:
        # The loss that would tell is that of the next step.
        names = [name for name, _ in model.named_parameters()]
        finite = [all_finite(to_local(parameter.detach())) for parameter in model.parameters()]
        # A process that is the only one to see it, in its share, must not be the only one to stop.
        if number := self._largest(len(names) - finite.index(False) if False in finite else 0):
            raise DivergedError(
                f"after step {self.state.global_step} {names[-number]} holds NaN or infinity: no checkpoint of it is "
                "kept. Try a lower train.learning_rate, a longer train.warmup_ratio or a smaller train.max_grad_norm"
            )

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(super()._get_output_dir(trial)) / PARTIAL)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As in `Trainer`, with what deployment needs besides: the tokenizer, and the cache that training turns off."""
        folder = output_dir or str(self.args.output_dir)
        with as_deployed(self.accelerator.unwrap_model(self.model).config):
            super()._save(output_dir, state_dict)
        if self.tokenizer is not None and self.args.should_save:
            try:
                self.tokenizer.save_pretrained(folder)
            except Exception as error:  # the tokenizers library raises nothing more special for a full disk
                raise OSError(*error.args) from error
            write_checksums(Path(folder))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.finish_saving()
        self._check_weights(model)
        parent = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(parent / PARTIAL, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with self._explained(self.state.global_step):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            self._commit(parent / PARTIAL / name, parent / name)

    def _commit(self, work: Path, folder: Path) -> None:
        """Gives what all processes have written its name."""
        if self.args.should_save:
            keep, always = self.keep_checkpoints, self.always_keep
            commit_checkpoint(work, folder, keep=keep, always_keep=always, run_id=self.run_id)
            shutil.rmtree(work.parent)

    def finish_saving(self) -> None:
        """Waits for a checkpoint that is written in the background, if there is one.

        Raises:
            OSError: where it cannot be written; the ones before it stay whole.
        """

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        parent = Path(str(self.args.output_dir))
        try:
            yield
        except BaseException as error:
            # Before what is half-written goes, which makes room.
            full = shutil.disk_usage(parent).free < 1 << 20 or getattr(error, "errno", None) == errno.ENOSPC
            if self.args.should_save:
                shutil.rmtree(parent / PARTIAL, ignore_errors=True)
            # torch.save reports a full disk as a RuntimeError of its zip writer.
            if not isinstance(error, OSError | SafetensorError | RuntimeError | CheckpointException):
                raise
            remaining = checkpoints(parent)
            good = f"{remaining[-1]} is whole" if remaining else "no earlier one was written"
            why = "the disk is full" if full else " ".join(str(error).split())
            raise OSError(f"the checkpoint of step {step} was not written: {why}; {good}") from error
