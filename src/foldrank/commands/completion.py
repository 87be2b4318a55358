"""`foldrank completion`: what a shell reads to complete the command at a tab."""

import argparse
from typing import Any

SHELLS = {
    "bash": "foldrank completion bash >> ~/.bash_completion",
    "zsh": "foldrank completion zsh > ~/.zfunc/_foldrank",
    "fish": "foldrank completion fish > ~/.config/fish/completions/foldrank.fish",
}
"""Each with where its lines are kept."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command line."""
    kept = "; ".join(SHELLS.values())
    parser.description = f"Print what a shell needs to complete foldrank's commands, options and files. Once: {kept}."
    parser.add_argument("shell", choices=SHELLS, help="the shell")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The lines for the shell."""
    from argcomplete.shell_integration import shellcode

    return {"lines": shellcode(["foldrank"], shell=arguments.shell)}


def show(result: dict[str, Any]) -> None:
    """Prints them."""
    print(result["lines"])
