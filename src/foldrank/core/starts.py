"""How the factors of a low-rank layer start. Shapes: A (r, d_in), B (d_out, r)."""

import torch
from torch import Tensor, nn

from foldrank.core.config import FactorStart


@torch.no_grad()
def draw_factors_(down: Tensor, up: Tensor, start: FactorStart) -> None:
    """Draws A and B, in place.

    `cola`: normal with deviation r^(-1/4) (d_in + d_out)^(-1/4) (CoLA, arXiv 2502.10940). `orthogonal`: both
    semi-orthogonal, with the Frobenius norms that CoLA's have. `zero`: A as `cola`, B zero.
    """
    if down.is_meta:  # where drawing nothing takes a millisecond
        return
    (rank, in_features), out_features = down.shape, up.shape[0]
    std = rank**-0.25 * (in_features + out_features) ** -0.25
    for factor in (down, up):
        if start == "orthogonal":
            nn.init.orthogonal_(factor)
            factor.mul_(std * factor.numel() ** 0.5 / factor.norm())
        else:
            nn.init.normal_(factor, std=std)
    if start == "zero":
        up.zero_()
