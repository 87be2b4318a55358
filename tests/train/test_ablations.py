"""Starts of the norm that the residual would give."""

import pytest
import torch
from torch import nn

from foldrank import LowRankConfig, LowRankLinear, ResidualConfig, factorize_
from foldrank.recipes.train_config import Ablation, TrainConfig
from foldrank.train.ablations import start_as_ablation_


def layer_with(residual: ResidualConfig | None) -> tuple[nn.Module, LowRankLinear]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30, bias=False))
    factorize_(model, LowRankConfig(rank=7, activation="silu", residual=residual))
    layer = model[0]
    assert isinstance(layer, LowRankLinear)
    return model, layer


@pytest.mark.parametrize("ablation", ["folded", "scaled", "random", "orthogonal"])
def test_each_control_has_the_norm_of_the_fold_and_no_residual(ablation: Ablation) -> None:
    model, layer = layer_with(ResidualConfig(alpha=2.0))
    assert layer.residual is not None
    start = layer.up.weight.detach().clone()
    folded = layer.residual(start)
    assert start_as_ablation_(model, ablation, seed=3) == ("0",)
    weight = layer.up.weight.detach()
    assert layer.residual is None
    assert float(weight.norm()) == pytest.approx(float(folded.norm()), rel=1e-5)
    if ablation == "folded":
        assert torch.equal(weight, folded)
    else:
        assert not torch.allclose(weight, folded, atol=0.1)
    if ablation == "scaled":
        assert torch.allclose(weight / weight.norm(), start / start.norm(), atol=1e-6)
    gram = weight.T @ weight
    apart = float((gram - torch.diag(torch.diag(gram))).abs().max() / gram.diagonal().mean())
    assert (apart < 1e-5) == (ablation == "orthogonal")


@pytest.mark.parametrize("ablation", ["random", "orthogonal"])
def test_what_is_drawn_depends_on_the_seed_alone(ablation: Ablation) -> None:
    def drawn(seed: int) -> torch.Tensor:
        model, layer = layer_with(ResidualConfig())
        torch.rand(seed)  # what was drawn before must not matter
        start_as_ablation_(model, ablation, seed=seed)
        return layer.up.weight.detach()

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_a_control_needs_a_fixed_residual_and_leaves_the_model_alone_otherwise() -> None:
    for residual, said in ((None, "has none"), (ResidualConfig(trainable=True), "alpha is trainable")):
        model, layer = layer_with(residual)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=said):
            start_as_ablation_(model, "scaled", seed=3)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert (layer.residual is None) == (residual is None)


def test_a_control_and_a_fold_at_the_start_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="both take the residual away"):
        TrainConfig(ablation="folded", fold_at_start=True)
