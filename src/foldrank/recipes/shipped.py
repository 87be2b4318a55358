"""The shipped recipes by name. Each is a few lines derived from another."""

from foldrank.recipes.demo import DEMO
from foldrank.recipes.families import BY_CONFIG
from foldrank.recipes.llama import LLAMA, LLAMA_FOSL
from foldrank.recipes.methods import by_muon
from foldrank.recipes.schema import Recipe
from foldrank.recipes.tiny import TINY

BY_SIZE = {**TINY, **LLAMA, **BY_CONFIG}

RECIPES: dict[str, Recipe] = {
    "demo": DEMO,
    **BY_SIZE,
    **{f"{name}-muon": by_muon(recipe) for name, recipe in BY_SIZE.items()},
    **LLAMA_FOSL,
}
"""The shipped recipes by name, from small to large."""
