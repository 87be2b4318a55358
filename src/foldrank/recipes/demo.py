"""The demo: a small CoLA + DLR Llama on the standard library's sources, minutes on two CPU cores.

By Muon, which ends 0.66 below AdamW here (EXPERIMENTS.md).
"""

from foldrank.recipes.methods import cola, with_dlr
from foldrank.recipes.schema import Recipe
from foldrank.recipes.settings import TrainConfig

DEMO = with_dlr(
    cola(Recipe(train=TrainConfig(steps=200, optimizer="muon", eval_every=50, eval_tokens=40_960)), rank=64)
)
