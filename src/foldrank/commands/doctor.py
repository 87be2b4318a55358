"""`foldrank doctor`: what this machine and installation have, a line each: what a report of a defect needs."""

import argparse
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

OPTIONAL = {
    "datasets": "Hugging Face data sets (pip install 'foldrank[data]')",
    "pyarrow": "Parquet and Zstandard (pip install 'foldrank[data]')",
    "scipy": "intervals of a report (pip install 'foldrank[report]')",
    "tensorboard": "train.report_to [tensorboard] (pip install 'foldrank[trackers]')",
    "trackio": "train.report_to [trackio] (pip install 'foldrank[trackers]')",
    "wandb": "train.report_to [wandb] (pip install 'foldrank[trackers]')",
    "peft": "adapters on a low-rank model (pip install 'foldrank[finetune]')",
    "trl": "fine-tuning to answer (pip install 'foldrank[finetune]')",
    "sklearn": "fine-tuning to classify (pip install 'foldrank[finetune]')",
    "lm_eval": "benchmarks (pip install 'foldrank[tasks]')",
    "onnxruntime": "export for small devices (pip install 'foldrank[onnx]')",
}
"""Packages that some commands need, with what for."""

GIB = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command line."""
    parser.description = "What this machine and installation have, a line each: what a report of a defect needs."


def run(arguments: argparse.Namespace) -> dict[str, Any]:  # noqa: ARG001
    """Looks."""
    import torch

    from foldrank.data.cache import cache_folder, lock_folder
    from foldrank.provenance import commit, versions
    from foldrank.train.device_memory import device_memory

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    try:
        cache: Path | None = cache_folder()
    except ValueError:
        cache = None
    folders = {"working folder": Path.cwd(), "temporary folder": Path(tempfile.gettempdir()), "locks": lock_folder()}
    if cache is not None:
        folders["cache"] = cache
    return {
        "versions": versions(),
        "commit": commit(),
        "python": sys.executable,
        "system": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "memory_bytes": device_memory("cpu"),
        "folders": {name: _folder(folder) for name, folder in folders.items()},
        "optional": {name: importlib.util.find_spec(name) is not None for name in OPTIONAL},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("FOLDRANK_")},
    }


def show(result: dict[str, Any]) -> None:
    """Prints a line each."""
    from foldrank.console import console

    out = console(soft_wrap=True)
    out.print("versions: " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    out.print(f"commit: {result['commit'] or 'not run from a source tree'}")
    out.print(f"python: {result['python']}")
    out.print(f"system: {result['system']}, {result['processor']}")
    out.print(f"processors: {result['cpus']}, of which PyTorch uses {result['threads']} threads")
    gpus = ", ".join(result["gpus"]) or "none that PyTorch can use"
    out.print(f"GPUs: {gpus} (CUDA {result['cuda'] or 'not in this PyTorch'})")
    out.print(f"memory: {result['memory_bytes'] / GIB:.1f} GiB")
    for name, folder in result["folders"].items():
        how = "writable" if folder["writable"] else "NOT writable"
        out.print(f"{name}: {folder['path']}, {how}, {folder['free_bytes'] / GIB:.1f} GiB free")
    for name, installed in result["optional"].items():
        out.print(f"{name}: {'installed' if installed else 'not installed'}: {OPTIONAL[name]}")
    for name, value in result["environment"].items():
        out.print(f"{name}={value}")


def _folder(folder: Path) -> dict[str, Any]:
    """Of a folder that may not be there yet, what its nearest parent allows."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return {
        "path": str(folder),
        "writable": os.access(nearest, os.W_OK),
        "free_bytes": shutil.disk_usage(nearest).free,
    }
