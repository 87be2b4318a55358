"""The published sizes on C4, 60M to 7B, under the protocol of GaLore (arXiv 2403.03507) with the settings of CoLA.

From the protocol: data, tokenizer, sequence length, 512 sequences per step, steps, cosine to a tenth, evaluation on 10M
tokens every 1,000 steps. From CoLA (arXiv 2502.10940): ranks, learning rates, warm-up, weight decay, clipping, betas.

CoLA's optimizer settings are used for every method, so that methods compare in pairs. For dense and for plain low rank
this choice is ours and untuned. Ours as well: float32 weights with bfloat16 products (GaLore's code keeps the weights
in bfloat16), the steps between checkpoints, and `micro_batch`: the largest power of two with which every method leaves
a tenth of 80 GB free according to `foldrank plan` for eight GPUs under DDP, or FSDP for 7B.

Names that end in `-fosl` have the settings of FOSL, an earlier public harness of the DLR paper's first author. They may
be those of DLR's own runs: a guess, as the paper's tables were not to be had. Its weights are pure bfloat16; here they
are float32.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from foldrank.data.config import DataConfig
from foldrank.recipes.methods import family
from foldrank.recipes.model_config import ModelConfig
from foldrank.recipes.schema import Recipe
from foldrank.recipes.train_config import TrainConfig

PROTOCOL = Recipe(
    model=ModelConfig(vocab_size=32_000),
    data=DataConfig(source="allenai/c4", subset="en", validation_split="validation", tokenizer="t5-base"),
    train=TrainConfig(
        batch_size=512,
        sequence_length=256,
        layout="padded",
        min_learning_rate_ratio=0.1,
        weight_decay=0.01,
        betas=(0.9, 0.999),
        max_grad_norm=0.5,
        eval_every=1000,
        eval_tokens=10_000_000,
        save_every=1000,
        log_every=10,
        dtype="bfloat16",
    ),
    sample_prompt="The ",
)
"""What all sizes share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """One published size: shape, rank, and what of its training depends on it."""

    width: int
    mlp: int
    layers: int
    heads: int
    rank: int
    steps: int
    warmup_steps: int
    learning_rate: float
    micro_batch: int
    sltrain_alpha: int
    sltrain_steps: int
    sltrain_density: float = 0.03


# fmt: off
SIZES = {
    "60m": Size(width=512, mlp=1376, layers=8, heads=8, rank=128,
                steps=10_000, warmup_steps=2_000, learning_rate=0.006, micro_batch=256,
                sltrain_alpha=32, sltrain_steps=11_000),
    "130m": Size(width=768, mlp=2048, layers=12, heads=12, rank=256,
                 steps=20_000, warmup_steps=2_000, learning_rate=0.003, micro_batch=256,
                 sltrain_alpha=16, sltrain_steps=22_000),
    "350m": Size(width=1024, mlp=2736, layers=24, heads=16, rank=256,
                 steps=60_000, warmup_steps=6_000, learning_rate=0.003, micro_batch=128,
                 sltrain_alpha=16, sltrain_steps=65_000),
    "1b": Size(width=2048, mlp=5461, layers=24, heads=32, rank=512,
               steps=100_000, warmup_steps=10_000, learning_rate=0.002, micro_batch=32,
               sltrain_alpha=8, sltrain_steps=140_000),
    "7b": Size(width=4096, mlp=11008, layers=32, heads=32, rank=1024,
               steps=150_000, warmup_steps=15_000, learning_rate=0.001, micro_batch=16,
               sltrain_alpha=8, sltrain_steps=150_000, sltrain_density=0.05),
}
# fmt: on


def one_pass(steps: int) -> DataConfig:
    """The protocol's data, no more of it than these steps use."""
    return replace(PROTOCOL.data, max_documents=steps * PROTOCOL.train.batch_size)


def dense(size: Size) -> Recipe:
    """The dense model of a size under the protocol."""
    return replace(
        PROTOCOL,
        model=replace(
            PROTOCOL.model,
            hidden_size=size.width,
            intermediate_size=size.mlp,
            num_layers=size.layers,
            num_heads=size.heads,
        ),
        data=one_pass(size.steps),
        train=replace(
            PROTOCOL.train,
            steps=size.steps,
            warmup_ratio=size.warmup_steps / size.steps,
            learning_rate=size.learning_rate,
            micro_batch_size=size.micro_batch,
        ),
    )


def as_published(recipe: Recipe, size: Size) -> Recipe:
    """What SLTrain's paper sets by size; other methods as they are."""
    if recipe.low_rank is None or recipe.low_rank.backbone != "sltrain":
        return recipe
    return replace(
        recipe,
        low_rank=replace(
            recipe.low_rank, scale=size.sltrain_alpha / size.rank, extra_config={"density": size.sltrain_density}
        ),
        data=one_pass(size.sltrain_steps),
        train=replace(recipe.train, steps=size.sltrain_steps),
    )


class Fosl(NamedTuple):
    """What FOSL sets by size."""

    steps: int
    warmup_steps: int
    learning_rate: float
    beta2: float


FOSL = {
    "60m": Fosl(11_000, 1_100, 0.01, 0.999),
    "130m": Fosl(22_000, 2_200, 0.005, 0.99),
    "350m": Fosl(65_000, 6_500, 0.003, 0.99),
    "1b": Fosl(140_000, 10_000, 0.002, 0.99),
}


def as_in_fosl(recipe: Recipe, fosl: Fosl) -> Recipe:
    """A low-rank recipe with FOSL's settings: no decay, and a low-rank scale that is learned through tanh."""
    assert recipe.low_rank is not None
    return replace(
        recipe,
        low_rank=replace(recipe.low_rank, scale="trainable"),
        data=one_pass(fosl.steps),
        train=replace(
            recipe.train,
            steps=fosl.steps,
            warmup_ratio=fosl.warmup_steps / fosl.steps,
            learning_rate=fosl.learning_rate,
            weight_decay=0.0,
            betas=(0.9, fosl.beta2),
        ),
    )


LLAMA: dict[str, Recipe] = {
    name: as_published(recipe, size)
    for label, size in SIZES.items()
    for name, recipe in family(f"llama-{label}", dense(size), size.rank).items()
}

LLAMA_FOSL: dict[str, Recipe] = {
    f"{name}-fosl": as_in_fosl(LLAMA[name], fosl)
    for label, fosl in FOSL.items()
    for name in (f"llama-{label}-{method}" for method in ("lowrank", "lowrank-dlr", "cola", "cola-dlr"))
}
