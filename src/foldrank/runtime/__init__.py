"""Runs a model that `foldrank export` wrote: onnxruntime or OpenVINO, tokenizers and numpy, no torch.

It imports nothing else of foldrank, and is a wheel of its own, `foldrank-runtime`, for devices that are to hold little.

    from foldrank.runtime import Model

    model = Model("exported")
    for piece in model.stream("def ", max_new_tokens=50, seed=0):
        print(piece, end="", flush=True)
"""

from foldrank.runtime.model import Model
from foldrank.runtime.sampling import Sampling

__all__ = ["Model", "Sampling"]
