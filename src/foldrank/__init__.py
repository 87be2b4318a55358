"""Pre-train language models from low-rank layers, with a residual that folds away (DLR, arXiv 2606.28932)."""

from importlib import import_module
from typing import TYPE_CHECKING

from foldrank import core

if TYPE_CHECKING:
    from foldrank.core import (
        AnchoredDecay,
        DuplicatedLatentResidual,
        FoldAtStartReport,
        FoldReport,
        LowRankConfig,
        LowRankLinear,
        ResidualConfig,
        fold_,
        fold_at_start_,
        fold_state_dict,
        fold_weight,
    )
    from foldrank.surgery import AttachReport, FactorizeReport, SparseLowRankLinear, attach_residual_, factorize_

__version__ = "0.1.0.dev0"

__all__ = [
    "AnchoredDecay",
    "AttachReport",
    "DuplicatedLatentResidual",
    "FactorizeReport",
    "FoldAtStartReport",
    "FoldReport",
    "LowRankConfig",
    "LowRankLinear",
    "ResidualConfig",
    "SparseLowRankLinear",
    "attach_residual_",
    "factorize_",
    "fold_",
    "fold_at_start_",
    "fold_state_dict",
    "fold_weight",
]


def __getattr__(name: str) -> object:
    # Lazy, so that `foldrank --help` does not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module 'foldrank' has no attribute {name!r}")
    return getattr(core if name in core.__all__ else import_module("foldrank.surgery"), name)


def __dir__() -> list[str]:
    return __all__
