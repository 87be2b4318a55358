"""The residual as the paper writes it, on activations: what foldrank would cost if it did not compute it on the weight.

y = B z + c Expand(z) + b        (arXiv 2606.28932)
"""

from torch import Tensor, nn

from foldrank.core.functional import literal_residual
from foldrank.core.inventory import inventory
from foldrank.core.linear import LowRankLinear


class OnActivations(nn.Module):
    """y = B z + c Expand(z) + b, the literal equation; a contiguous expansion repeats, which beats indexing."""

    def __init__(self, layer: LowRankLinear) -> None:
        super().__init__()
        assert layer.residual is not None
        self.layer = layer
        self.c = layer.residual.coefficient()
        self.index, values_O = layer.residual.terms(layer.up.weight)
        signed = layer.residual.config.signs != "none"
        self.values = values_O if signed else self.c
        contiguous = layer.residual.config.expansion == "contiguous" and not signed
        self.repeats = -(-layer.out_features // layer.rank) if contiguous else None

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer.latents(x)
        y = self.layer.up(z)
        if self.repeats is None:
            return y + literal_residual(z, self.index, self.values)
        return y + self.c * z.repeat_interleave(self.repeats, dim=-1)[..., : self.layer.out_features]


def on_activations_(model: nn.Module) -> None:
    """Lets every layer with a residual compute it on activations, in place; its parameters stay."""
    contents = inventory(model)
    for name, layer in contents.low_rank_layers.items():
        if layer.residual is not None:
            literal = OnActivations(layer)
            for parent, attribute in contents.parents[name]:
                setattr(parent, attribute, literal)
