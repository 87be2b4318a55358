"""The demo: a small CoLA + DLR Llama on the standard library's sources, minutes on two CPU cores.

By Muon, which ends at 3.89 here, and AdamW at 4.84 (4.58 at its better rate of 0.006; EXPERIMENTS.md).
"""

from foldrank.recipes.methods import cola, with_dlr
from foldrank.recipes.schema import Recipe
from foldrank.recipes.train_config import TrainConfig

DEMO = with_dlr(
    cola(
        Recipe(train=TrainConfig(steps=200, optimizer="muon", learning_rate=0.008, eval_every=50, eval_tokens=40_960)),
        rank=64,
    )
)
