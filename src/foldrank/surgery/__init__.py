"""Surgery: a model becomes one of low-rank layers, in place. It needs torch alone.

    targets.py (which layers), backbones.py (kinds by name), ranks.py (a budget's), approximation.py (trained weights')
      -> factorize.py (their replacement) -> report.py

Beside it `attach.py` gives a residual to low-rank layers that someone else wrote, and `memory_format.py` lays folded
weights out for decoding on a CPU. What layers compute, and the fold, is `foldrank.core`.
"""

from foldrank.surgery.attach import AttachReport, attach_residual_
from foldrank.surgery.backbones import BACKBONES
from foldrank.surgery.factorize import FactorizeReport, describe, factorize_
from foldrank.surgery.memory_format import MemoryFormatReport, to_column_major_
from foldrank.surgery.sparse import SparseLowRankLinear

__all__ = [
    "BACKBONES",
    "AttachReport",
    "FactorizeReport",
    "MemoryFormatReport",
    "SparseLowRankLinear",
    "attach_residual_",
    "describe",
    "factorize_",
    "to_column_major_",
]
