"""The residual as the paper writes it, on activations: what foldrank would cost if it did not compute it on the weight.

y = B z + c Expand(z) + b        (arXiv 2606.28932)
"""

from torch import Tensor, nn

from foldrank.core.inventory import walk
from foldrank.core.linear import LowRankLinear
from foldrank.core.functional import literal_residual


class OnActivations(nn.Module):
    """y = B z + c Expand(z) + b, the literal equation; a contiguous expansion repeats, which beats indexing."""

    def __init__(self, layer: LowRankLinear) -> None:
        super().__init__()
        assert layer.residual is not None
        self.layer = layer
        self.c = layer.residual.coefficient()
        self.index = layer.residual.latent_index(layer.up.weight.device)
        contiguous = layer.residual.config.expansion == "contiguous"
        self.repeats = -(-layer.out_features // layer.rank) if contiguous else None

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer.latents(x)
        y = self.layer.up(z)
        if self.repeats is None:
            return y + literal_residual(z, self.index, self.c)
        return y + self.c * z.repeat_interleave(self.repeats, dim=-1)[..., : self.layer.out_features]


def on_activations_(model: nn.Module) -> None:
    """Lets every layer with a residual compute it on activations, in place; its parameters stay."""
    for _, module, homes in list(walk(model)):
        if isinstance(module, LowRankLinear) and module.residual is not None:
            literal = OnActivations(module)
            for parent, attribute in homes:
                setattr(parent, attribute, literal)
