"""What a benchmark is asked to do, and the recipe of each method at its sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch

from foldrank.bench import BENCHMARKS
from foldrank.bounds import Bounds, out_of_bounds
from foldrank.recipes.methods import BACKBONE_RECIPES, DENSE, Method
from foldrank.recipes.reading import load_recipe
from foldrank.recipes.schema import Recipe
from foldrank.train.activation_checkpointing import checkpoint_activations_
from foldrank.train.model import meta_model, resolve_vocab_size

AT_START, ON_ACTIVATIONS, COMPILED, COLUMNWISE = "folded", "activations", "compiled", "columnwise"
LATENTS, WHOLE_BLOCKS, CHUNKED, BFLOAT16 = "latents", "checkpointed", "chunked-loss", "bfloat16"
MUON, SPECTRON = "muon", "spectron"


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """Another way to compute what a method computes."""

    benchmarks: tuple[str, ...] = ("step", "memory")
    """Those that tell it from the method itself."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the recipe, by dotted name; none where the benchmark itself does it."""

    of_residual: bool = False
    """Whether it is a way to compute the residual, and the method needs one."""


VARIANTS = {
    AT_START: Variant(settings={"train.fold_at_start": True}, of_residual=True),
    ON_ACTIVATIONS: Variant(benchmarks=("layer", "step"), of_residual=True),
    LATENTS: Variant(settings={"train.activation_checkpointing": "latents"}),
    WHOLE_BLOCKS: Variant(settings={"train.activation_checkpointing": "block"}),
    CHUNKED: Variant(benchmarks=("step", "memory", "trainer"), settings={"train.chunked_loss": True}),
    BFLOAT16: Variant(settings={"train.dtype": "bfloat16"}),
    MUON: Variant(benchmarks=("step", "memory", "trainer"), settings={"train.optimizer": "muon"}),
    SPECTRON: Variant(benchmarks=("step", "memory", "trainer"), settings={"train.optimizer": "spectron"}),
    COMPILED: Variant(
        benchmarks=("layer", "step", "prefill", "decode", "trainer"), settings={"train.compile": "blocks"}
    ),
    COLUMNWISE: Variant(benchmarks=("prefill", "decode")),
}
"""Variants by what is written behind a method's name: the fold at step 0; the residual by the literal equation, on
activations; activation checkpointing but for the latents, and of whole blocks; the loss by chunks; bfloat16 autocast;
an optimizer; `torch.compile`, in `decode` with CUDA graphs; weights column by column. Several may follow one another:
`cola-dlr-folded-latents`."""

DEFAULT_METHODS = {
    "layer": ("dense", "lowrank", "cola", "cola-dlr", "cola-dlr-activations"),
    "start": ("dense", "cola-dlr"),
    "step": ("dense", "cola", "cola-dlr", "cola-dlr-folded"),
    "memory": ("dense", "cola", "cola-dlr", "cola-dlr-folded"),
    "prefill": ("dense", "lowrank", "cola-dlr"),
    "decode": ("dense", "lowrank", "cola-dlr"),
    "fold": ("cola-dlr",),
    "trainer": ("cola-dlr",),
    "loader": ("cola-dlr",),
}
"""The first is the baseline. `fold`, `trainer` and `loader` take one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """A benchmark's settings, as its record keeps them.

    Raises:
        ValueError: naming every setting that is out of range.
    """

    benchmark: str
    """A name of `BENCHMARKS`."""

    recipe: str = "demo"
    """A recipe with low-rank layers: its sizes, rank and residual are those of each method."""

    methods: Sequence[str] = ()
    """Methods by name, the baseline first; none: the benchmark's own. `dense`, or one of `METHODS`, with `-dlr` for the
    residual; behind it one or more of `VARIANTS`."""

    layers: Annotated[int | None, Bounds(1, 1 << 9)] = None
    """Blocks, in place of the recipe's."""

    vocabulary: Annotated[int | None, Bounds(2, 1 << 22)] = None
    """Entries of embedding and head, in place of the recipe's."""

    batch_size: Annotated[int | None, Bounds(1, 1 << 16)] = None
    """Sequences at a time; None: those of the recipe's forward pass, one in `prefill` and `decode`."""

    sequence_length: Annotated[int | None, Bounds(2, 1 << 20)] = None
    """Tokens per sequence, or of a prompt, in place of the recipe's."""

    new_tokens: Annotated[int, Bounds(1, 1 << 16)] = 32
    """Tokens that `decode` adds to a prompt."""

    steps: Annotated[int, Bounds(2, 10**6)] = 10
    """Steps in a round of `trainer`, of which the first is not counted."""

    shards: Annotated[int, Bounds(1, 1000)] = 4
    """Files of the checkpoint that `fold` folds, about."""

    rounds: Annotated[int, Bounds(2, 10_000)] = 20
    """Rounds, in each of which every method runs once."""

    device: str = "cpu"
    """cpu or cuda."""

    dtype: str | None = None
    """float32, or bfloat16: autocast in training, the weights themselves in `prefill` and `decode`. None: float32 on a
    CPU, bfloat16 on a GPU."""

    profile: bool = False
    """Keep, of one more run of each method, which operators took its time."""

    note: str = ""
    """What the record's reader should know: an explanation, a circumstance."""

    peak_flops: Annotated[float | None, Bounds(0, 1e20, above=True)] = None
    """FLOP/s of the device in `dtype`, without sparsity, for the share of them that a step reaches (MFU). None: of the
    GPUs in train/utilization.py theirs."""

    def __post_init__(self) -> None:
        problems = out_of_bounds(self)
        if self.benchmark not in BENCHMARKS:
            problems.append(f"no benchmark is called {self.benchmark!r}: there are {', '.join(BENCHMARKS)}")
        if self.device not in ("cpu", "cuda"):
            problems.append(f"device must be cpu or cuda, got {self.device!r}")
        elif self.device == "cuda" and not torch.cuda.is_available():
            problems.append("device is cuda, and there is no GPU that PyTorch can use")
        if self.dtype not in (None, "float32", "bfloat16"):
            problems.append(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def method_names(self) -> tuple[str, ...]:
        """The methods, the baseline first."""
        return tuple(self.methods) or DEFAULT_METHODS[self.benchmark]

    @property
    def bfloat16(self) -> bool:
        """Whether products are in bfloat16."""
        return (self.dtype or ("float32" if self.device == "cpu" else "bfloat16")) == "bfloat16"

    def sizes(self) -> Recipe:
        """The recipe with the sizes replaced, and no variant of its own: a method is what its name says.

        Raises:
            ValueError: where there is no such recipe, or one without low-rank layers of one rank.
        """
        recipe = load_recipe(self.recipe)
        if recipe.low_rank is None or not isinstance(recipe.low_rank.rank, int):
            raise ValueError(f"{self.recipe} does not have low-rank layers of one rank: name a recipe such as demo")
        train = recipe.train
        batch_size = 1 if self.benchmark in ("prefill", "decode") else train.resolve_micro_batch_size()
        return replace(
            recipe,
            model=replace(
                recipe.model.with_layers(self.layers or recipe.model.num_layers),
                vocab_size=self.vocabulary or recipe.model.vocab_size,
            ),
            train=replace(
                train,
                batch_size=self.batch_size or batch_size,
                micro_batch_size=None,
                sequence_length=self.sequence_length or train.sequence_length,
                dtype="bfloat16" if self.bfloat16 else "float32",
                device="cpu" if self.device == "cpu" else "auto",
                fold_at_start=False,
                ablation=None,
                activation_checkpointing=None,
                chunked_loss=False,
                compile="none",
                optimizer="adamw",
            ),
        )

    def recipe_of(self, method: str) -> Recipe:
        """The recipe of a method at these sizes, its variants' settings among it.

        Raises:
            ValueError: for a method that does not exist, or that cannot be computed in this way.
        """
        recipe = self.sizes()
        assert recipe.low_rank is not None
        assert isinstance(recipe.low_rank.rank, int)
        variants = {name: variant for name, variant in VARIANTS.items() if self.benchmark in variant.benchmarks}
        try:
            parsed = parse(method)
        except ValueError as error:
            raise ValueError(f"{self.benchmark} knows no method {method!r}: {_known(variants)}") from error
        names = parsed.variants
        if not all(name in variants and (parsed.residual or not variants[name].of_residual) for name in names):
            raise ValueError(f"{self.benchmark} knows no method {method!r}: {_known(variants)}")
        settings: dict[str, Any] = {}
        for name in names:
            if twice := settings.keys() & variants[name].settings.keys():
                raise ValueError(f"{method} sets {', '.join(twice)} twice: leave out all but one of {' '.join(names)}")
            settings |= variants[name].settings
        recipe = parsed.recipe(replace(recipe, low_rank=None), recipe.low_rank.rank).override(settings)
        if LATENTS in names:
            checkpoint_activations_(meta_model(recipe, self.vocabulary_size()), recipe.train.activation_checkpointing)
            if COMPILED in names:
                raise ValueError(f"{method}: blocks that keep their latents are not compiled")
        return recipe

    def vocabulary_size(self) -> int:
        """Entries of embedding and head."""
        return resolve_vocab_size(self.sizes())


def parse(method: str) -> Method:
    """What a method's name means, its variants among it."""
    return Method.parse(method, VARIANTS)


def _known(variants: Mapping[str, Variant]) -> str:
    text = f"there are {DENSE} and {', '.join(BACKBONE_RECIPES)}, these with -dlr"
    for whose, of_residual in (("any", False), ("those with -dlr", True)):
        names = [f"-{name}" for name, variant in variants.items() if variant.of_residual == of_residual]
        text += f"; {whose} with {', '.join(names)}" if names else ""
    return text
