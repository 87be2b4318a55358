"""The demo: a small CoLA + DLR Llama on the standard library's sources, minutes on two CPU cores."""

from foldrank.recipes.methods import cola, with_dlr
from foldrank.train.recipe import Recipe

DEMO = with_dlr(cola(Recipe(), rank=64))
