"""`foldrank generate`: let a checkpoint continue a text."""

import argparse
from typing import Any

from foldrank.commands.arguments import number, whole_number, with_notes
from foldrank.commands.checkpoint_arguments import (
    add_checkpoint_arguments,
    add_device_argument,
    device_of,
    is_exported,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command line."""
    add_checkpoint_arguments(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument(
        "--max-new-tokens",
        type=whole_number(1, 1 << 20),
        default=100,
        metavar="N",
        help="at most so many (default: 100)",
    )
    parser.add_argument(
        "--temperature", type=number(0, 1000), default=0.7, metavar="T", help="0 is greedy (default: 0.7)"
    )
    parser.add_argument("--seed", type=whole_number(0, (1 << 32) - 1), default=0, help="seed of the draw (default: 0)")
    add_device_argument(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Generates."""
    if not arguments.prompt:
        raise ValueError("--prompt is empty: give at least one character to continue")
    if is_exported(arguments):
        return _exported(arguments)
    from foldrank.hf.checkpoint import load
    from foldrank.hf.foreign import foreign
    from foldrank.surgery.memory_format import to_column_major_
    from foldrank.train.evaluate import check_fits, continue_text

    notes: list[str] = []
    device = device_of(arguments)
    model, tokenizer = load(arguments.checkpoint, accept_changes=arguments.accept_changes, tell=notes.append)
    prompt = tokenizer(arguments.prompt, add_special_tokens=False).input_ids
    if told := check_fits(model, tokenizer, len(prompt) + arguments.max_new_tokens):
        notes.append(told)
    if device == "cpu":
        to_column_major_(model)  # for one token after the other
    model.to(device)  # pyright: ignore[reportArgumentType]
    with foreign(f"{arguments.checkpoint} cannot generate"):
        text = continue_text(
            model,
            tokenizer,
            arguments.prompt,
            seed=arguments.seed,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            static_cache=device != "cpu",
        )
    return with_notes({"checkpoint": str(arguments.checkpoint), "prompt": arguments.prompt, "text": text}, notes)


def _exported(arguments: argparse.Namespace) -> dict[str, Any]:
    from foldrank.runtime import Model, Sampling

    model = Model(arguments.checkpoint)
    told = model.note_on(arguments.prompt, arguments.max_new_tokens)
    text = model.generate(
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        sampling=Sampling(temperature=arguments.temperature),
        seed=arguments.seed,
    )[0]
    text = arguments.prompt + text
    return with_notes(
        {"checkpoint": str(arguments.checkpoint), "prompt": arguments.prompt, "text": text}, [told] if told else []
    )


def show(result: dict[str, Any]) -> None:
    """Prints the text, prompt included."""
    print(result["text"])
