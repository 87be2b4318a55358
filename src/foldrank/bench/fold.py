"""The fold of a checkpoint on disk, file by file, over copying its files; and how much memory it takes."""

import multiprocessing
import shutil
import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from foldrank.bench.interleaved import interleaved_timing, timed
from foldrank.bench.record import Findings, Gate
from foldrank.bench.settings import Settings
from foldrank.bench.start import peak_resident_bytes
from foldrank.core.inventory import low_rank_layers
from foldrank.hf.checkpoint import fold_checkpoint, inspect, weight_files
from foldrank.train.model import build_model


def run(settings: Settings) -> Findings:
    """Folds and copies a checkpoint of random weights interleaved.

    Raises:
        ValueError: where there is more than one method, or it has no residual, or a folded weight is not B + c R.
    """
    if len(settings.method_names) != 1:
        raise ValueError(f"fold takes one method, got {', '.join(settings.method_names)}")
    with tempfile.TemporaryDirectory() as work_folder:
        source, copied, folded = (Path(work_folder) / name for name in ("source", "copied", "folded"))
        name, expected = _write_checkpoint(settings, source)

        def copy() -> None:
            copied.mkdir()
            for file in source.iterdir():
                shutil.copyfile(file, copied / file.name)

        timers = {
            "copy": timed(copy, "cpu", partial(shutil.rmtree, copied, ignore_errors=True)),
            "fold": timed(
                partial(fold_checkpoint, source, folded), "cpu", partial(shutil.rmtree, folded, ignore_errors=True)
            ),
        }
        timers["fold"]()
        difference = float((_tensor(folded, name) - expected).abs().max())
        gate = Gate(what=f"the folded {name} and B + c R", difference=difference, bound=0.0).check()
        figures = interleaved_timing(timers, settings.rounds, warm_up=1, profile=settings.profile)
        shutil.rmtree(folded)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            idle, peak = pool.apply(_memory, (source, folded))
        sizes = [file.stat().st_size for file in weight_files(source)]
    figures["fold"] |= {
        "bytes": sum(sizes),
        "files": len(sizes),
        "largest_file_bytes": max(sizes),
        "idle_bytes": idle,
        "peak_bytes": peak,
    }
    return Findings(cases={"checkpoint": figures}, gates=(gate,))


@torch.no_grad()
def _write_checkpoint(settings: Settings, folder: Path) -> tuple[str, Tensor]:
    """Saves a model, and gives the name of one of its up-projections and what its fold must be."""
    (method,) = settings.method_names
    model = build_model(settings.recipe_of(method), settings.vocabulary_size())
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=-(-size // settings.shards))
    name, layer = next(iter(low_rank_layers(model).items()), ("", None))
    if layer is None or layer.residual is None:
        raise ValueError(f"{method} has no residual to fold")
    expected = layer.up.weight.clone()
    expected[torch.arange(layer.out_features), layer.residual.latent_index()] += layer.residual.coefficient()
    return f"{name}.up.weight", expected


def _tensor(folder: Path, name: str) -> Tensor:
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - a safetensors file is no mapping
                return tensors.get_tensor(name)
    raise AssertionError(f"{name} was not written")


def _memory(source: Path, out: Path) -> tuple[int, int]:
    """Largest resident memory of this process before and after the fold."""
    inspect(source)
    idle = peak_resident_bytes()
    fold_checkpoint(source, out)
    return idle, peak_resident_bytes()
