"""The shipped recipes by name. Each is a few lines derived from another."""

from foldrank.recipes.demo import DEMO
from foldrank.recipes.llama import LLAMA
from foldrank.recipes.schema import Recipe
from foldrank.recipes.tiny import TINY

RECIPES: dict[str, Recipe] = {"demo": DEMO, **TINY, **LLAMA}
