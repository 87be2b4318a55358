"""What a study asks: frozen settings, read from YAML, and the recipe of each of its runs."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from pydantic import TypeAdapter

from foldrank.core.config import STRICT
from foldrank.finetune.settings import FinetuneSettings
from foldrank.recipes.methods import DENSE, Method
from foldrank.recipes.reading import load_recipe
from foldrank.recipes.schema import Recipe
from foldrank.structured import to_yaml

PRINTABLE = re.compile(r"[\w.+-]+")
"""Names that can be part of a file's name."""


DECIDED = {"train.learning_rate": "sweep.learning_rates and learning_rate_of", "seed": "seeds and sweep.seeds"}
"""Settings of each run that a study decides itself, with what says them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """One size of the model.

    Raises:
        ValueError: for a rank below 1.
    """

    __pydantic_config__ = STRICT

    rank: int
    """Rank of every low-rank method."""

    base: str | None = None
    """Dense recipe of this size; None: the study's."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the recipe by dotted name."""

    learning_rates_of: str | None = None
    """Take the learning rates that were chosen for this size, such as a shorter run, instead of sweeps."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyMethod:
    """One method of a study: a shipped kind, with settings of its own.

    Raises:
        ValueError: for an unknown kind.
    """

    __pydantic_config__ = STRICT

    name: str
    """How tables call it."""

    kind: str = ""
    """dense, lowrank, cola, sltrain or crnet; with -dlr behind it, the same with the residual. Empty: the name says
    it."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the recipe by dotted name."""

    rank: int | None = None
    """Rank; None: that of the size."""

    group: str = "main"
    """Table in which it stands."""

    against: Sequence[str] | None = None
    """Methods it is compared with; None: dense, and for a method with DLR the same without; of several, the first with
    its optimizer."""

    learning_rate_of: str | None = None
    """Take the learning rate that was chosen for this method instead of a sweep."""

    flops_of: str | None = None
    """Train for as many steps as cost the FLOPs of this method's run."""

    corpora: Sequence[str] | None = None
    """Corpora on which it runs; None: all."""

    seeds: Sequence[int] | None = None
    """Seeds of its final runs; None: those of the study."""

    def __post_init__(self) -> None:
        if not PRINTABLE.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is no name: letters, digits, '.', '_', '+' and '-' make one")
        try:
            self.parsed_kind()
        except ValueError as error:
            raise ValueError(f"method {self.name!r} is of no known kind: give kind ({error})") from error

    def parsed_kind(self) -> Method:
        """What the kind means, which the name implies where none is given."""
        return Method.parse(self.kind or self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """How each method's learning rate is chosen: the one with the lowest mean validation loss over the sweep's seeds.

    Raises:
        ValueError: for rates that are no geometric series of at least one number above 0.
    """

    __pydantic_config__ = STRICT

    learning_rates: Sequence[float]
    """Rates tried, from small to large, each by the same factor larger than the one before."""

    seeds: Sequence[int] = (1000,)
    """Seeds of the sweep; apart from those of the final runs, so that no final run was picked for its luck."""

    extend: int = 2
    """How many more rates may be tried beyond an end of the series, one by one, while the best one is the last."""

    steps: int | None = None
    """Steps of a run of the sweep; None: as many as of a final run."""

    halve_at: Sequence[float] = field(default_factory=list)
    """Shares of those steps, such as [0.25, 0.5], at each of which the rates with the worse validation loss stop, the
    better half, rounded up, goes on (successive halving); rates tried beyond the series run whole."""

    def __post_init__(self) -> None:
        rates = self.learning_rates
        if not rates or not all(0 < rate < math.inf for rate in rates) or not self.seeds:
            raise ValueError("a sweep needs learning rates above 0 and at least one seed")
        factors = [b / a for a, b in pairwise(rates)]
        if any(not math.isclose(factor, factors[0], rel_tol=0.2) or factor <= 1 for factor in factors):
            raise ValueError(f"learning_rates must grow by one factor, got {list(rates)}")
        ends = (0, *self.halve_at, 1)
        if any(one >= other for one, other in pairwise(ends)):
            raise ValueError(f"halve_at must be growing shares between 0 and 1, got {list(self.halve_at)}")
        if self.extend < 0:
            raise ValueError(f"extend must be at least 0, got {self.extend}")

    def rates_left(self) -> list[int]:
        """How many rates of the series train up to each step at which some stop, and to the end."""
        left = [len(self.learning_rates)]
        for _ in self.halve_at:
            left.append(math.ceil(left[-1] / 2))
        return left

    @property
    def factor(self) -> float:
        """From one rate to the next."""
        rates = self.learning_rates
        return (rates[-1] / rates[0]) ** (1 / (len(rates) - 1)) if len(rates) > 1 else 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A comparison of methods. All its runs differ from `base` by what is named here and in nothing else.

    Raises:
        ValueError: naming everything that does not fit together.
    """

    __pydantic_config__ = STRICT

    title: str
    question: str = ""
    """What is to be found out, in a sentence or two; the report begins with it."""

    base: str = "tiny-dense"
    """Dense recipe from which all runs derive."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of all runs by dotted name."""

    corpora: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"stdlib": {}})
    """Corpora by name, each with its settings of the recipe."""

    sizes: Mapping[str, Size] = field(default_factory=lambda: {"tiny": Size(rank=32)})
    """Sizes by name."""

    methods: Sequence[StudyMethod]
    """What is compared, in the order of running. In YAML a kind alone stands for a method of that name."""

    sweep: Sweep
    """How the learning rates are chosen."""

    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    """Seeds of the final runs: of the weights at the start and of the order of the data."""

    finetune: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Fine-tunings of the folded model of each final run, by name, each with its settings (`data`, `task`, `epochs` and
    so on, docs/fine-tuning.md); the seed is the run's."""

    def __post_init__(self) -> None:
        names = [method.name for method in self.methods]
        problems = [f"two methods are called {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
        order = {name: number for number, name in enumerate(names)}
        for method in self.methods:
            spoken_of = (*(method.against or ()), method.learning_rate_of, method.flops_of)
            problems += [
                f"method {method.name!r} speaks of {other!r}, which is no method of this study"
                for other in spoken_of
                if other is not None and other not in order
            ]
            if (other := method.learning_rate_of) in order and order[other] >= order[method.name]:
                problems.append(f"method {method.name!r} must stand behind {other!r}, whose learning rate it takes")
            if cycle := self._flops_cycle(method, names):
                problems.append(f"flops_of goes in a circle: {' -> '.join(cycle)}")
            if missing := set(method.corpora or ()) - set(self.corpora):
                problems.append(f"method {method.name!r} speaks of unknown corpora: {', '.join(sorted(missing))}")
        sizes = list(self.sizes)
        problems += [
            f"size {name!r} must stand behind {other!r}, whose learning rates it takes"
            for name, size in self.sizes.items()
            if (other := size.learning_rates_of) is not None
            and (other not in sizes or sizes.index(other) >= sizes.index(name))
        ]
        problems += [
            f"{name!r} is no name of a corpus or size: letters, digits, '.', '_', '+' and '-' make one"
            for name in (*self.corpora, *self.sizes)
            if not PRINTABLE.fullmatch(name)
        ]
        folders = [f"{corpus}-{size}" for corpus in self.corpora for size in self.sizes]
        problems += [
            f"two pairs of corpus and size are both called {name!r} in the names of runs: rename one"
            for name in sorted({name for name in folders if folders.count(name) > 1})
        ]
        given = [self.settings, *self.corpora.values(), *(size.settings for size in self.sizes.values())]
        given += [method.settings for method in self.methods]
        problems += [
            f"{name} is no setting of a study: {how} say it"
            for name, how in DECIDED.items()
            if any(name in settings for settings in given)
        ]
        for name, values in self.finetune.items():
            try:
                self.finetuning(name, seed=0)
            except ValueError as error:
                problems.append(f"finetune.{name}: {error}")
            if "seed" in values or not PRINTABLE.fullmatch(name):
                problems.append(f"finetune.{name}: the seed is the run's, and letters, digits, '._+-' make a name")
        if not self.methods or not self.seeds or not self.corpora or not self.sizes:
            problems.append("a study needs methods, seeds, corpora and sizes")
        if problems:
            raise ValueError("; ".join(problems))

    def _flops_cycle(self, method: StudyMethod, names: Sequence[str]) -> list[str]:
        """The chain of `flops_of` from a method back to itself; empty where it ends."""
        by_name, chain = dict(zip(names, self.methods, strict=True)), [method.name]
        while (other := by_name[chain[-1]].flops_of) in by_name:
            chain.append(other)
            if other in chain[:-1]:
                return chain
        return []

    def method(self, name: str) -> StudyMethod:
        """The method called `name`."""
        return next(method for method in self.methods if method.name == name)

    def corpora_of(self, method: StudyMethod) -> Sequence[str]:
        """The corpora on which a method runs."""
        return method.corpora if method.corpora is not None else tuple(self.corpora)

    def seeds_of(self, method: StudyMethod) -> Sequence[int]:
        """The seeds of a method's final runs."""
        return method.seeds if method.seeds is not None else self.seeds

    def sweep_of(self, size: str, method: StudyMethod) -> tuple[str, StudyMethod]:
        """The size and the method whose sweep chooses the learning rate of a method at a size; mostly these two."""
        if (other := self.sizes[size].learning_rates_of) is not None:
            return self.sweep_of(other, method)
        return self.sweep_of(size, self.method(of)) if (of := method.learning_rate_of) is not None else (size, method)

    def has_sweep(self, size: str, method: StudyMethod) -> bool:
        """Whether a method's learning rate at a size is chosen by a sweep of its own."""
        return self.sweep_of(size, method) == (size, method)

    def against(self, method: StudyMethod) -> Sequence[str]:
        """The methods with which a method is compared."""
        if method.against is not None:
            return method.against
        kind, optimizer = method.parsed_kind(), method.settings.get("train.optimizer")
        names = []
        for wanted in (Method(backbone=DENSE), *([kind.without_residual()] if kind.residual else [])):
            of_kind = [m for m in self.methods if m.group == method.group and m.parsed_kind() == wanted]
            alike = [other for other in of_kind if other.settings.get("train.optimizer") == optimizer]
            names += [other.name for other in (alike or of_kind)[:1] if other.name != method.name]
        return names

    def recipe(self, corpus: str, size: str, method: StudyMethod) -> Recipe:
        """The recipe of a method, its learning rate and seed still those of the base.

        Raises:
            ValueError: for settings that no recipe has, or that do not fit.
        """
        of_size = self.sizes[size]
        recipe = load_recipe(of_size.base or self.base)
        if recipe.low_rank is not None:
            raise ValueError(f"{of_size.base or self.base} is low-rank: a study derives from a dense recipe")
        recipe = recipe.override({**self.settings, **self.corpora[corpus], **of_size.settings})
        recipe = method.parsed_kind().recipe(recipe, method.rank or of_size.rank)
        recipe = recipe.override(method.settings)
        if method.flops_of is None:
            return recipe
        other = self.recipe(corpus, size, self.method(method.flops_of))
        steps = round(other.train.steps * _flops(other) / _flops(recipe))
        return replace(recipe, train=replace(recipe.train, steps=steps))

    def finetuning(self, name: str, *, seed: int) -> FinetuneSettings:
        """The settings of one of its fine-tunings.

        Raises:
            ValueError: for settings that no fine-tuning has.
        """
        return FinetuneSettings.from_dict({**self.finetune[name], "seed": seed})

    def to_yaml(self) -> str:
        """The study as text; `load_study` reads it back."""
        return to_yaml(ADAPTER.dump_python(self, mode="json"))


ADAPTER = TypeAdapter(Study)
"""Between a study and its plain values."""


def _flops(recipe: Recipe) -> int:
    from foldrank.train.accounting import training_flops

    train = recipe.train
    return training_flops(recipe).total * train.batch_size * train.sequence_length
