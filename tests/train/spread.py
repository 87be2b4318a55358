"""Run under torchrun by test_spread.py: commands one after the other, and what each process holds of a model.

Arguments: a file with a list of command lines, the dtype by default, and a folder. Writes `facts.RANK.json` there.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from foldrank.cli import main
from foldrank.core.anchored_decay import fold_at_start_
from foldrank.core.dtensor import full_tensor, to_local
from foldrank.recipes import load_recipe
from foldrank.train.model import build_model
from foldrank.train.processes import shared_by
from foldrank.train.sharded_checkpoints import OPTIMIZER, load_state_, load_weights_, state_of
from foldrank.train.sharding import shards, split_

VOCABULARY = 320


class SummedNumbers(TorchDispatchMode):
    """Counts the numbers that processes sum, by the shape of the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_reduce" in str(function):
            tensor = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
            self.numbers += tensor.numel()
        return function(*args, **(kwargs or {}))


def numbers_on_the_wire(recipe_file: str, settings: dict[str, Any]) -> int:
    """Of one forward and backward pass of a batch of 3 sequences of 5 tokens."""
    model = build_model(load_recipe(recipe_file, settings), VOCABULARY)
    if settings.get("train.fold_at_start"):
        fold_at_start_(model)
    split_(model)
    tokens = torch.arange(15).view(3, 5)
    with SummedNumbers() as counted:
        model(input_ids=tokens, labels=tokens).loss.backward()
    return counted.numbers


def bytes_held(recipe_file: str) -> int:
    """Weights, gradients and optimizer state of this process after a step, in float32."""
    recipe = load_recipe(recipe_file, {"train.sharding": "fsdp"})
    place = shards(recipe.train, torch.device("cpu"))
    model = build_model(recipe, VOCABULARY, place=place if dist.is_initialized() else None)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.arange(16).view(1, 16)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters()), *state_of(model, optimizer).values()]
    return sum(to_local(tensor).nbytes for tensor in held if tensor is not None)


def read(recipe_file: str, checkpoint: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds, gathered from the shares that each process reads."""
    recipe = load_recipe(recipe_file, {"train.sharding": "fsdp"})
    model = build_model(recipe, VOCABULARY, place=shards(recipe.train, torch.device("cpu")))
    optimizer = torch.optim.AdamW(model.parameters())
    load_weights_(model, checkpoint)
    load_state_(model, optimizer, checkpoint / OPTIMIZER)
    everything = {**model.state_dict(), **state_of(model, optimizer)}
    return {name: full_tensor(tensor).clone() for name, tensor in everything.items()}


def work() -> None:
    tasks, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[3])
    torch.set_default_dtype(getattr(torch, sys.argv[2]))
    shared_by("cpu")
    facts: dict[str, Any] = {}
    for command in tasks.get("commands", ()):
        assert main(command) == 0, command
    for name, (recipe, settings) in tasks.get("wire", {}).items():
        facts[name] = numbers_on_the_wire(recipe, settings)
    if "bytes" in tasks:
        facts["bytes"] = bytes_held(tasks["bytes"])
    if "read" in tasks:
        everything = read(*tasks["read"][:1], Path(tasks["read"][1]))
        if int(os.environ.get("RANK", "0")) == 0:
            torch.save(everything, folder / "read.pt")
    (folder / f"facts.{os.environ.get('RANK', '0')}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    work()
