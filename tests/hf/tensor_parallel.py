"""Run under torchrun by test_serving.py: a checkpoint split over two processes, by tensors or by FSDP2.

Arguments: the folder with the checkpoints. Writes `facts.json` there.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig


def split(folder: Path) -> Any:
    how = DistributedConfig(tp_size=2, tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, distributed_config=how)


def facts(folder: Path) -> dict[str, Any]:
    try:
        model = split(folder)
    except ValueError as error:
        return {"refused": str(error)}
    expected = load_file(folder.with_suffix(".expected"))
    with torch.no_grad():
        logits = model(input_ids=expected["tokens"]).logits
    shapes = {name.split("layers.1.")[-1]: list(value.to_local().shape) for name, value in local(model)}
    return {
        "module": type(model).__module__.partition(".")[0],
        "apart": (logits - expected["logits"]).abs().max().item(),
        "split": shapes,
    }


def local(model: Any) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in model.named_parameters() if "layers.1." in name and is_split(value)]


def is_split(value: Any) -> bool:
    return hasattr(value, "to_local") and value.to_local().shape != value.shape


def resaved(folder: Path, out: Path) -> bool:
    """Whether a model that FSDP2 sharded saves, from both processes, what it was."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.save_pretrained(out)
    dist.barrier()
    one, two = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    root = Path(sys.argv[1])
    hidden = sys.modules.pop("foldrank", None)
    sys.modules["foldrank"] = None  # pyright: ignore[reportArgumentType] - importing it is now an ImportError
    without = {path.name: facts(path) for path in sorted(root.iterdir()) if path.is_dir()}
    del sys.modules["foldrank"]
    import foldrank.hf  # noqa: F401 - registers the classes

    within = {path.name: facts(path) for path in sorted(root.iterdir()) if path.is_dir()}
    saved = {name: resaved(root / name, root / f"{name}.sharded") for name in ("cola", "unfolded")}
    if dist.get_rank() == 0:
        found = {"without foldrank": without, "with foldrank": within, "sharded": saved}
        (root / "facts.json").write_text(json.dumps(found))
    dist.destroy_process_group()
