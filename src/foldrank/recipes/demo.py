"""The demo: a small CoLA + DLR Llama on the standard library's sources, minutes on two CPU cores."""

from foldrank.config import LowRankConfig, ResidualConfig
from foldrank.train.recipe import Recipe

DEMO = Recipe(low_rank=LowRankConfig(rank=64, activation="silu", residual=ResidualConfig(alpha=1.0)))
