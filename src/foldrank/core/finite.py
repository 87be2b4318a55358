"""Whether numbers are finite, in one pass over them."""

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; NaN is the extreme of all that holds one."""
    # isfinite of all entries takes ten times as long on a CPU.
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
