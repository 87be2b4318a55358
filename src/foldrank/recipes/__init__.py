"""What is asked: a recipe's settings (schema), the shipped recipes, methods by name, and how recipes are read."""

from foldrank.recipes.reading import load_recipe
from foldrank.recipes.schema import Recipe
from foldrank.recipes.shipped import RECIPES

__all__ = ["RECIPES", "Recipe", "load_recipe"]
