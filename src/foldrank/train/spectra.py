"""Singular values of what the layers of a trained model multiply by."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldrank.core.dtensor import full_tensor
from foldrank.core.linear import LowRankLinear
from foldrank.surgery.sparse import SparseLowRankLinear, flat_support


@torch.no_grad()
def spectra(model: PreTrainedModel, widest: int | None = None) -> dict[str, list[float]]:
    """The singular values of each layer of a folded model's blocks, largest first, by name, to 5 digits.

    Of a low-rank layer those of B A, whatever stands between the factors; of SLTrain's those of B A + S.

    Args:
        model: folded.
        widest: leave out matrices that must be decomposed as a whole, dense ones and SLTrain's, where the smaller of
            their sides is above this.
    """
    by_kind: dict[str, list[float]] = {}
    for name, module in model.base_model.named_modules():
        parent = name.rpartition(".")[0]
        if isinstance(module, LowRankLinear) or (isinstance(module, nn.Linear) and parent not in by_kind):
            if widest is not None and _as_a_whole(module) > widest:
                continue
            values = _singular_values(module)
            by_kind[name] = [float(f"{value:.5g}") for value in values.tolist()]
    return by_kind


def _as_a_whole(layer: nn.Module) -> int:
    """The smaller side of what is decomposed as a whole; 0 where two factors are, which is quick at any width."""
    if isinstance(layer, LowRankLinear) and not isinstance(layer, SparseLowRankLinear):
        return 0
    return min(layer.in_features, layer.out_features) if isinstance(layer, LowRankLinear | nn.Linear) else 0


def _singular_values(layer: nn.Module) -> Tensor:
    if isinstance(layer, SparseLowRankLinear):
        weight = full_tensor(layer.up.weight).double() @ full_tensor(layer.down.weight).double()
        weight.view(-1)[flat_support(layer.rows, layer.columns, layer.in_features)] += full_tensor(
            layer.values
        ).double()
        return torch.linalg.svdvals(weight)
    if isinstance(layer, LowRankLinear):
        # Those of the product of two small matrices: B = Q R and A^T = Q' R' give B A the singular values of R R'^T.
        tall = torch.linalg.qr(full_tensor(layer.up.weight).double()).R
        wide = torch.linalg.qr(full_tensor(layer.down.weight).double().T).R
        return torch.linalg.svdvals(tall @ wide.T)
    assert isinstance(layer, nn.Linear)
    return torch.linalg.svdvals(full_tensor(layer.weight).double())
