"""Pre-train language models from low-rank layers, with a residual that folds away (DLR, arXiv 2606.28932)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foldrank.attach import AttachReport, attach_residual_
    from foldrank.config import LowRankConfig, ResidualConfig
    from foldrank.fold import FoldReport, fold_, fold_state_dict, fold_weight
    from foldrank.linear import LowRankLinear
    from foldrank.residual import DuplicatedLatentResidual
    from foldrank.sparse import SparseLowRankLinear
    from foldrank.surgery import FactorizeReport, factorize_

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

_HOMES = {
    "AttachReport": "attach",
    "DuplicatedLatentResidual": "residual",
    "FactorizeReport": "surgery",
    "FoldReport": "fold",
    "LowRankConfig": "config",
    "LowRankLinear": "linear",
    "ResidualConfig": "config",
    "SparseLowRankLinear": "sparse",
    "attach_residual_": "attach",
    "factorize_": "surgery",
    "fold_": "fold",
    "fold_state_dict": "fold",
    "fold_weight": "fold",
}


def __getattr__(name: str) -> object:
    # Lazy, so that `foldrank --help` does not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'foldrank' has no attribute {name!r}")
    return getattr(import_module(f"foldrank.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
