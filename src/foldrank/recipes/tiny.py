"""A family small enough to compare methods on two CPU cores, on the demo's data. Its sizes and settings are ours."""

from foldrank.recipes.methods import family
from foldrank.recipes.model_config import ModelConfig
from foldrank.recipes.schema import Recipe
from foldrank.recipes.train_config import TrainConfig

TINY = family(
    "tiny",
    Recipe(
        model=ModelConfig(hidden_size=128, intermediate_size=344, num_layers=4, num_heads=4),
        train=TrainConfig(sequence_length=128, eval_tokens=32_768),
    ),
    rank=32,
)
