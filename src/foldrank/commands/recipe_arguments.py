"""The part of the command line that names a recipe and replaces settings of it; `pretrain` and `plan` share it."""

import argparse
from collections.abc import Callable
from typing import Any

from foldrank.commands.arguments import setting_value, whole_number
from foldrank.recipes import RECIPES
from foldrank.recipes.reading import load_recipe
from foldrank.recipes.schema import Recipe, field_help, text_settings

GROUPS = ("low_rank", "low_rank.residual")
"""Parts of a recipe that can be switched off as a whole with `null`."""


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the recipe, `--steps`, and one option per setting."""
    parser.epilog = f"Recipes: {', '.join(RECIPES)}."
    recipe: Any = parser.add_argument(
        "recipe", metavar="RECIPE", help="name of a recipe (listed below), or a .yaml file"
    )
    recipe.completer = lambda **_: list(RECIPES)
    parser.add_argument(
        "--steps", type=whole_number(1, 10**9), metavar="N", help="optimizer steps; short for --train.steps"
    )
    settings = parser.add_argument_group(
        "settings of the recipe", "each replaces one; null is off; text is taken as it is typed, other values are YAML"
    )
    for name in GROUPS:
        settings.add_argument(f"--{name}", type=setting_type(name), default=argparse.SUPPRESS, help="null: none")
    for name, meaning in field_help().items():
        settings.add_argument(
            f"--{name}",
            type=setting_type(name),
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=meaning.replace("%", "%%"),
        )


def setting_type(name: str) -> Callable[[str], Any]:
    """How the value of a setting is read from a command line: text as it is typed, anything else as YAML."""
    return setting_value(text_settings().get(name))


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
