"""The part of the command line that names a recipe and replaces settings of it; `pretrain` and `plan` share it."""

import argparse
from typing import Any

import yaml

from foldrank.recipes import RECIPES
from foldrank.recipes.reading import load_recipe
from foldrank.recipes.schema import Recipe, field_help

GROUPS = ("low_rank", "low_rank.residual")
"""Parts of a recipe that can be switched off as a whole with `null`."""


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the recipe, `--steps`, and one option per setting."""
    parser.epilog = f"Recipes: {', '.join(RECIPES)}."
    parser.add_argument("recipe", metavar="RECIPE", help="name of a recipe (listed below), or a .yaml file")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps; short for --train.steps")
    settings = parser.add_argument_group("settings of the recipe", "each replaces one; values are YAML, null is off")
    for name in GROUPS:
        settings.add_argument(f"--{name}", type=yaml_value, default=argparse.SUPPRESS, help="null: none")
    for name, meaning in field_help().items():
        settings.add_argument(
            f"--{name}",
            type=yaml_value,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=meaning.replace("%", "%%"),
        )


def yaml_value(text: str) -> Any:
    """What an option's value means as YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a YAML value") from error


def recipe_from(arguments: argparse.Namespace) -> Recipe:
    """The recipe that a command line means.

    Raises:
        ValueError: for an unknown recipe or setting, or a value out of range.
    """
    names = {*field_help(), *GROUPS}
    overrides: dict[str, Any] = {name: value for name, value in vars(arguments).items() if name in names}
    if arguments.steps is not None:
        overrides["train.steps"] = arguments.steps
    return load_recipe(arguments.recipe, overrides)
