"""The core: the low-rank layer, its residual, what a model holds, and the fold. It needs torch alone.

Read in this order: functional, residual, scale, linear; then inventory and fold. What turns a model into one of such
layers is `foldrank.surgery`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foldrank.core.anchored_decay import AnchoredDecay, FoldAtStartReport, fold_at_start_
    from foldrank.core.config import LowRankConfig, ResidualConfig
    from foldrank.core.drawn import named_generator
    from foldrank.core.fold import FoldReport, fold_, fold_state_dict, fold_weight
    from foldrank.core.functional import effective_weight, expansion_index, literal_residual
    from foldrank.core.linear import LowRankLinear
    from foldrank.core.residual import DuplicatedLatentResidual
    from foldrank.core.scale import LowRankScale

__all__ = [
    "AnchoredDecay",
    "DuplicatedLatentResidual",
    "FoldAtStartReport",
    "FoldReport",
    "LowRankConfig",
    "LowRankLinear",
    "LowRankScale",
    "ResidualConfig",
    "effective_weight",
    "expansion_index",
    "fold_",
    "fold_at_start_",
    "fold_state_dict",
    "fold_weight",
    "literal_residual",
    "named_generator",
]

_MODULES = ("config", "functional", "residual", "scale", "linear", "drawn", "fold", "anchored_decay")


def __getattr__(name: str) -> object:
    # Lazy, and the configs first, because they are read where torch is not waited for.
    for module in _MODULES if name in __all__ else ():
        if name in vars(import_module(f"foldrank.core.{module}")):
            return getattr(import_module(f"foldrank.core.{module}"), name)
    raise AttributeError(f"module 'foldrank.core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
