"""What the commands that read a checkpoint share on the command line."""

import argparse
from pathlib import Path

from foldrank.hub import PREFIX, download


def add_checkpoint_arguments(parser: argparse.ArgumentParser, what: str = "folder of a checkpoint") -> None:
    """Adds the checkpoint, and whether one that is not as it was saved is accepted."""
    what += f", or a repository on the Hugging Face hub as {PREFIX}OWNER/NAME"
    parser.add_argument("checkpoint", type=checkpoint_folder, metavar="CHECKPOINT", help=what)
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="read it although files are not as they were saved, because another tool has rewritten them",
    )


def checkpoint_folder(text: str) -> Path:
    """The folder of a checkpoint; of one on the hub, where it was downloaded to."""
    if not text.startswith(PREFIX):
        return Path(text)
    try:
        return download(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the device on which the model runs."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one (default)"
    )


def device_of(arguments: argparse.Namespace) -> str:
    """The device that is asked for.

    Raises:
        ValueError: for a GPU where there is none.
    """
    import torch

    if arguments.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, and there is no GPU that PyTorch can use")
    return arguments.device


def is_exported(arguments: argparse.Namespace) -> bool:
    """Whether the checkpoint is a graph that `foldrank export` wrote, which its runtime runs on the CPU.

    Raises:
        ValueError: where it is, and another device is asked for.
    """
    if not (arguments.checkpoint / "runtime.json").is_file():
        return False
    if arguments.device == "cuda":
        raise ValueError("--device is cuda, and an exported model runs on the CPU")
    return True
