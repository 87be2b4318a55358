"""How a recipe is found by name, read from YAML, and compared with another."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foldrank.recipes.schema import Recipe, field_help
from foldrank.recipes.shipped import RECIPES
from foldrank.structured import read_yaml


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A shipped recipe by name, or one from a YAML file, with settings replaced by dotted name.

    A YAML file holds settings as `--print_config` shows them; `base: NAME` takes the rest from another recipe. The
    `config.yaml` of a run is such a file.

    Raises:
        ValueError: for an unknown name, a file that is no such file, an unknown or wrong setting, and files whose bases
            go in a circle.

    Example:
        >>> load_recipe("tiny-cola-dlr", {"train.steps": 50}).train.steps
        50
    """
    return _load(name, ()).override(overrides or {})


def _load(name: str, below: tuple[str, ...]) -> Recipe:
    """A recipe, which those called `below` build on."""
    if name in RECIPES:
        return RECIPES[name]
    if name.lower().endswith((".yaml", ".yml")):
        if name in below:
            raise ValueError(f"base goes in a circle: {' -> '.join((*below[below.index(name) :], name))}")
        settings = read_yaml(Path(name), "a recipe")
        settings.pop("run", None)
        base = settings.pop("base", None)
        if not (base is None or isinstance(base, str)):
            raise ValueError(f"{name}: base must be the name of a recipe or of a .yaml file, got {base!r}")
        start = Recipe() if base is None else _load(base, (*below, name))
        return start.override(flatten(settings))
    near = ", ".join(difflib.get_close_matches(name, RECIPES, n=3, cutoff=0))
    raise ValueError(f"no recipe is called {name!r}; the nearest are {near} (or give a .yaml file)")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name; a table by pattern, such as of ranks, is one setting."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and dotted not in field_help():
            flat |= flatten(value, f"{dotted}.")
        else:
            flat[dotted] = value
    return flat


def _with_each_field(tree: dict[str, Any]) -> dict[str, Any]:
    """Settings with the fields of a config one by one, beside those of the recipe."""
    config = tree["model"].pop("config", None)
    return tree if config is None else {**tree, "model.config": config}


def diff(then: Recipe, now: Recipe) -> list[str]:
    """In words, the settings in which two recipes differ."""
    before, after = (flatten(_with_each_field(recipe.to_dict())) for recipe in (then, now))
    return [
        f"{key} was {before.get(key)} and is {after.get(key)}"
        for key in sorted(before | after)
        if before.get(key) != after.get(key)
    ]
