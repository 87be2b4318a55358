"""The shipped recipes by name. Each is a few lines derived from another."""

from foldrank.recipes.demo import DEMO
from foldrank.recipes.llama import LLAMA
from foldrank.recipes.tiny import TINY
from foldrank.train.recipe import Recipe

RECIPES: dict[str, Recipe] = {"demo": DEMO, **TINY, **LLAMA}
