"""Checkpoints of a sharded model: each process writes its shares in the background, and any number of them reads on.

    shares of weights and optimizer state -> staged on the CPU -> files of each process (torch.distributed.checkpoint)
      -> the first process: weights gathered a file at a time into an ordinary checkpoint, manifest, name

    checkpoint-STEP/  config, tokenizer, model.safetensors     whole, as of any other run: to evaluate, fold, load
                      optimizer/                               the shares of the optimizer's state
                      scheduler.pt, rng_state_*, trainer_state.json, manifest.json

All of it is safetensors: PyTorch's own format of such checkpoints would have to be unpickled.
"""

import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.optim import Optimizer

from foldrank.core.dtensor import full_tensor
from foldrank.hf.base import distinct_weights, save_description
from foldrank.hf.checkpoint import INDEX
from foldrank.hf.checksums import write_checksums
from foldrank.structured import to_json
from foldrank.train.checkpoints import step_of
from foldrank.train.processes import group_on_cpu
from foldrank.train.safe_checkpoints import SafeCheckpoints, as_deployed
from foldrank.train.sharding import is_spread

OPTIMIZER = "optimizer"
"""Folder of the shares of the optimizer's state, in a checkpoint."""

WEIGHTS, STATE = 1, 2
"""Numbers of the two files that each process writes."""

SCALAR = "scalar "
"""Begins the key of a number, which is stored as a vector of one."""

LARGEST_FILE = 4 << 30
"""Bytes of weights in a file, all of which the first process holds at one moment."""


class ShardedCheckpoints(SafeCheckpoints):
    """As `SafeCheckpoints`, also of a model that is spread over processes (train/sharding.py).

    Args:
        kwargs: as of `SafeCheckpoints`.
    """

    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sharded = sharded = is_spread(self.model)
        # transformers' word for a model that is not to be wrapped or moved: gradients are summed where they are shared.
        self.is_distributed_loading_by_transformers = sharded
        self._group: Any = group_on_cpu() if sharded else None
        self._executor = ThreadPoolExecutor(1)
        self._written: Any = None
        self._saving: tuple[int, Future[None]] | None = None

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Of accumulated gradients the last alone are summed over the processes."""
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """What is neither split nor sharded has the same gradient on all processes, as they see the same sequences."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm: Any = super()._get_grad_norm(model, grad_norm)
        return full_tensor(norm)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.sharded:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            assert output_dir is not None
            assert self.tokenizer is not None
            with as_deployed(self.model.config):
                save_description(self.model, Path(output_dir))
            self.tokenizer.save_pretrained(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
        weights, state = distinct_weights(self.model), state_of(self.model, self.optimizer)
        writer = HuggingFaceStorageWriter(
            str(Path(output_dir) / OPTIMIZER),
            fqn_to_index_mapping={**dict.fromkeys(weights, WEIGHTS), **dict.fromkeys(state, STATE)},
            save_distributed=True,
        )
        self._written = async_save({**weights, **state}, storage_writer=writer, process_group=self._group)
        return None

    def _commit(self, work: Path, folder: Path) -> None:
        if not self.sharded:
            return super()._commit(work, folder)
        self._saving = step_of(folder), self._executor.submit(self._finish, self._written, work, folder)
        return None

    def _finish(self, written: Future[Any], work: Path, folder: Path) -> None:
        written.result()
        if self.args.should_save:
            gather_weights(work / OPTIMIZER, work)
            write_checksums(work)
            super()._commit(work, folder)

    def finish_saving(self) -> None:
        if self._saving is not None:
            (step, saving), self._saving = self._saving, None
            with self._explained(step):
                saving.result()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.sharded:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        return load_weights_(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_state_(self.model, self.optimizer, Path(checkpoint) / OPTIMIZER)
        self._load_scheduler(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
        return None

    def _load_scheduler(self, state: dict[str, Any]) -> None:
        # Of its groups there may be more or fewer than then: what is split and what is not are groups of their own.
        scheduler, step = self.lr_scheduler, state["last_epoch"]
        rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        of_groups = {"base_lrs": scheduler.base_lrs, "lr_lambdas": [None] * len(rates), "_last_lr": rates}
        scheduler.load_state_dict({**state, **of_groups})
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def state_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The tensors that an optimizer keeps, by what they are and whose."""
    return {
        _key(kind, name, scalar=value.dim() == 0): value.reshape(1) if value.dim() == 0 else value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_weights_(model: nn.Module, folder: Path) -> None:
    """Gives each process its shares of the weights in a checkpoint, in place."""
    load(distinct_weights(model), storage_reader=HuggingFaceStorageReader(str(folder)))


def load_state_(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Gives an optimizer its shares of the state that any number of processes has written."""
    stored = _stored(folder)
    parameters, state = dict(model.named_parameters()), {}
    for key, about in stored.items():
        parameter = parameters[_name(key)]
        shared = about.size == parameter.shape and not key.startswith(SCALAR)
        dtype = about.properties.dtype
        state[key] = (
            torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            if shared
            else torch.zeros(about.size, dtype=dtype, device=parameter.device)
        )
    load(state, storage_reader=HuggingFaceStorageReader(str(folder)))
    for key, value in state.items():
        kind = key.removeprefix(SCALAR).partition("/")[0]
        optimizer.state[parameters[_name(key)]][kind] = value.reshape(()) if key.startswith(SCALAR) else value


def gather_weights(shares: Path, folder: Path) -> None:
    """Makes of the shares of weights the files of an ordinary checkpoint, one after the other, and removes the shares.

    Args:
        shares: what all processes have written.
        folder: gets `model.safetensors`, or several and their index.
    """
    stored = {key: about for key, about in _stored(shares).items() if "/" not in key}
    files = list(_by_file(stored))
    names = {}
    for number, keys in enumerate(files, start=1):
        weights = {key: torch.empty(stored[key].size, dtype=stored[key].properties.dtype) for key in keys}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")  # this process reads alone, as is meant
            load(weights, storage_reader=HuggingFaceStorageReader(str(shares)), no_dist=True)
        file = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
        save_file(weights, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(keys, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(map(_bytes, stored.values()))}, "weight_map": names}
        (folder / INDEX).write_text(to_json(index, indent=2) + "\n")
    for file in shares.glob(f"*-{WEIGHTS:05}-of-*"):
        file.unlink()


def _stored(folder: Path) -> dict[str, TensorStorageMetadata]:
    stored: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return stored


def _by_file(stored: Mapping[str, TensorStorageMetadata]) -> Iterator[list[str]]:
    keys, size = [], 0
    for key, about in stored.items():
        if keys and size + _bytes(about) > LARGEST_FILE:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += _bytes(about)
    yield keys


def _bytes(about: TensorStorageMetadata) -> int:
    return about.size.numel() * about.properties.dtype.itemsize


def _key(kind: str, name: str, *, scalar: bool) -> str:
    return f"{SCALAR if scalar else ''}{kind}/{name}"


def _name(key: str) -> str:
    return key.partition("/")[2]
