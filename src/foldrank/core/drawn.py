"""What is drawn once for a module, from a seed and the module's name alone, on the CPU: the same on every machine."""

import hashlib

import torch
from torch import Tensor


def named_generator(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU for what is drawn once for the module called `name`, whatever was drawn before.

    Example:
        >>> one, other = (torch.rand(2, generator=named_generator(0, "layers.0")) for _ in range(2))
        >>> torch.equal(one, other)
        True
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def random_index(out_features: int, rank: int, *, seed: int, name: str) -> Tensor:
    """A latent for each output, uniform.

    Shape:
        int64 (out_features,), each entry in [0, rank).
    """
    return torch.randint(rank, (out_features,), generator=named_generator(seed, name), device="cpu")


def random_signs(out_features: int, *, seed: int, name: str) -> Tensor:
    """+1 or -1 for each output, uniform.

    Shape:
        int64 (out_features,).
    """
    return torch.randint(2, (out_features,), generator=named_generator(seed, f"{name}/signs"), device="cpu") * 2 - 1
