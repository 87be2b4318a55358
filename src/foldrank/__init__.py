"""Pre-train language models from low-rank layers, with a residual that folds away (DLR, arXiv 2606.28932)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foldrank.core.attach import AttachReport, attach_residual_
    from foldrank.core.config import LowRankConfig, ResidualConfig
    from foldrank.core.fold import FoldReport, fold_, fold_state_dict, fold_weight
    from foldrank.core.linear import LowRankLinear
    from foldrank.core.residual import DuplicatedLatentResidual
    from foldrank.core.sparse import SparseLowRankLinear
    from foldrank.core.surgery import FactorizeReport, factorize_

__version__ = "0.1.0"

__all__ = [
    "AttachReport",
    "DuplicatedLatentResidual",
    "FactorizeReport",
    "FoldReport",
    "LowRankConfig",
    "LowRankLinear",
    "ResidualConfig",
    "SparseLowRankLinear",
    "attach_residual_",
    "factorize_",
    "fold_",
    "fold_state_dict",
    "fold_weight",
]

_MODULES = {
    "AttachReport": "core.attach",
    "DuplicatedLatentResidual": "core.residual",
    "FactorizeReport": "core.surgery",
    "FoldReport": "core.fold",
    "LowRankConfig": "core.config",
    "LowRankLinear": "core.linear",
    "ResidualConfig": "core.config",
    "SparseLowRankLinear": "core.sparse",
    "attach_residual_": "core.attach",
    "factorize_": "core.surgery",
    "fold_": "core.fold",
    "fold_state_dict": "core.fold",
    "fold_weight": "core.fold",
}


def __getattr__(name: str) -> object:
    # Lazy, so that `foldrank --help` does not wait for torch.
    if name not in _MODULES:
        raise AttributeError(f"module 'foldrank' has no attribute {name!r}")
    return getattr(import_module(f"foldrank.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
