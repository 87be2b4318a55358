"""Run in several processes by test_spread.py: runs one after the other, and what each holds of a model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage] - DDP names it
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from foldrank.core.dtensor import full_tensor, to_local
from foldrank.recipes import Recipe, load_recipe
from foldrank.train.model import build_model, shape_of
from foldrank.train.pretrain import pretrain
from foldrank.train.processes import shared_by
from foldrank.train.sharded_checkpoints import OPTIMIZER, load_state_, load_weights_, state_of
from foldrank.train.sharding import Placement, is_spread, plan_of
from foldrank.train.wire import wire

VOCABULARY = 320
NO_BYTES = ("wait", "wrap")


class Counted(TorchDispatchMode):
    """Counts the bytes of tensors that processes exchange, as large as they are when they are whole."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = {"summed": 0, "gathered": 0, "scattered": 0}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # what these exchange themselves comes here again
        name = str(function)
        if name.startswith("c10d._allgather_base_"):
            self.bytes["gathered"] += args[0].nbytes
        elif name.startswith("c10d._reduce_scatter_base_"):
            self.bytes["scattered"] += args[1].nbytes
        elif name.startswith("c10d.allreduce_"):
            self.bytes["summed"] += sum(tensor.nbytes for tensor in args[0])
        elif name.startswith("_c10d_functional.all_gather"):
            self.bytes["gathered"] += args[0].nbytes * args[1]
        elif name.startswith("_c10d_functional.all_reduce"):
            self.bytes["summed"] += args[0].nbytes
        else:
            assert not (name.startswith(("c10d.", "_c10d")) and not any(word in name for word in NO_BYTES)), name
        return function(*args, **(kwargs or {}))

    def of_bucket(self, _: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """What DDP sums is seen by its own hook alone."""
        self.bytes["summed"] += bucket.buffer().nbytes
        future: Any = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future


def placement(recipe: Recipe) -> Placement:
    """What spreads a model as `pretrain` does."""
    return Placement(recipe.train, torch.device("cpu"), plan_of(shape_of(recipe, VOCABULARY), recipe.train))


def exchanged(recipe_file: str, settings: dict[str, Any]) -> list[dict[str, int]]:
    """The bytes of one step, counted, and by the formula."""
    recipe = load_recipe(recipe_file, settings)
    train = recipe.train
    model = build_model(recipe, VOCABULARY, place=placement(recipe) if train.spreads else None)
    counted = Counted()
    runs: Any = model
    if not is_spread(model):
        runs = DistributedDataParallel(model, broadcast_buffers=False)
        runs.register_comm_hook(None, counted.of_bucket)
    processes = dist.get_world_size()
    shares = processes // train.tensor_parallel
    size = train.resolve_micro_batch_size(shares)
    passes = train.batch_size // shares // size
    tokens = torch.arange(size * train.sequence_length).view(size, -1) % VOCABULARY
    with counted:
        for number in range(passes):
            if train.sharding == "fsdp":
                runs.set_requires_gradient_sync(number == passes - 1)
            runs(input_ids=tokens, labels=tokens).loss.backward()
    formula = wire(recipe, gpus=processes, vocab_size=VOCABULARY)
    expected = {"summed": formula.summed, "gathered": formula.gathered + formula.joined, "scattered": formula.scattered}
    return [counted.bytes, expected]


def bytes_held(recipe_file: str) -> int:
    """Weights, gradients and optimizer state of this process after a step, in float32."""
    recipe = load_recipe(recipe_file, {"train.sharding": "fsdp"})
    model = build_model(recipe, VOCABULARY, place=placement(recipe) if dist.is_initialized() else None)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.arange(16).view(1, 16)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters()), *state_of(model, optimizer).values()]
    return sum(to_local(tensor).nbytes for tensor in held if tensor is not None)


def read(recipe_file: str, settings: dict[str, Any], checkpoint: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds, gathered from the shares that each process reads."""
    recipe = load_recipe(recipe_file, {**settings, "train.sharding": "fsdp"})
    model = build_model(recipe, VOCABULARY, place=placement(recipe))
    optimizer = torch.optim.AdamW(model.parameters())
    load_weights_(model, checkpoint)
    load_state_(model, optimizer, checkpoint / OPTIMIZER)
    everything = {**model.state_dict(), **state_of(model, optimizer)}
    return {name: full_tensor(tensor).clone() for name, tensor in everything.items()}


def normed(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """What transformers' norm computes, in the width of its input."""
    mean = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(mean + self.variance_epsilon)


@contextmanager
def in_float64() -> Iterator[None]:
    """Models are made and trained in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        # Transformers' norms would round to float32.
        with patch.object(LlamaRMSNorm, "forward", normed), patch.object(Qwen3RMSNorm, "forward", normed):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def work(tasks: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Does the tasks in one of the processes.

    Args:
        tasks: by kind.
        folder: gets what is read of a checkpoint.

    Returns:
        The facts that they come to.
    """
    shared_by("cpu")
    # The operations of a compiled graph run as they are: kernels take a minute to compile.
    compile_: Any = partialmethod(nn.Module.compile, backend="aot_eager")
    nn.Module.compile = compile_
    facts: dict[str, Any] = {}
    for run in tasks.get("runs", ()):
        recipe = load_recipe(run.pop("recipe"), run.pop("settings"))
        with in_float64() if run.pop("float64") else nullcontext():
            pretrain(recipe, **run)
    for name, (recipe, settings) in tasks.get("wire", {}).items():
        facts[name] = exchanged(recipe, settings)
    if "bytes" in tasks:
        facts["bytes"] = bytes_held(tasks["bytes"])
    if "read" in tasks:
        recipe_file, settings, checkpoint = tasks["read"]
        everything = read(recipe_file, settings, Path(checkpoint))
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save(everything, folder / "read.pt")
    return facts
