"""The core: layers, the residual, what a model holds, surgery, the fold. It needs torch alone.

Read in this order: functional, residual, scale, linear, fold; then inventory and surgery.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foldrank.core.anchored_decay import AnchoredDecay, FoldAtStartReport, fold_at_start_
    from foldrank.core.attach import AttachReport, attach_residual_
    from foldrank.core.backbones import BACKBONES
    from foldrank.core.config import LowRankConfig, ResidualConfig
    from foldrank.core.drawn import named_generator
    from foldrank.core.fold import FoldReport, fold_, fold_state_dict, fold_weight
    from foldrank.core.functional import effective_weight, expansion_index, literal_residual
    from foldrank.core.linear import LowRankLinear
    from foldrank.core.memory_format import MemoryFormatReport, to_column_major_
    from foldrank.core.residual import DuplicatedLatentResidual
    from foldrank.core.scale import LowRankScale
    from foldrank.core.sparse import SparseLowRankLinear
    from foldrank.core.surgery import FactorizeReport, describe, factorize_

__all__ = [
    "BACKBONES",
    "AnchoredDecay",
    "AttachReport",
    "DuplicatedLatentResidual",
    "FactorizeReport",
    "FoldAtStartReport",
    "FoldReport",
    "LowRankConfig",
    "LowRankLinear",
    "LowRankScale",
    "MemoryFormatReport",
    "ResidualConfig",
    "SparseLowRankLinear",
    "attach_residual_",
    "describe",
    "effective_weight",
    "expansion_index",
    "factorize_",
    "fold_",
    "fold_at_start_",
    "fold_state_dict",
    "fold_weight",
    "literal_residual",
    "named_generator",
    "to_column_major_",
]

_MODULES = (
    *("config", "functional", "residual", "scale", "linear", "sparse"),
    *("backbones", "surgery", "attach", "fold", "anchored_decay", "memory_format"),
)


def __getattr__(name: str) -> object:
    # Lazy, and the configs first, because they are read where torch is not waited for.
    for module in _MODULES if name in __all__ else ():
        if name in vars(import_module(f"foldrank.core.{module}")):
            return getattr(import_module(f"foldrank.core.{module}"), name)
    raise AttributeError(f"module 'foldrank.core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
