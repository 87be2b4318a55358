"""Alpha: trainable, by pattern, changed between evaluations; residuals on some layers alone."""

import copy
import gc
import math

import pytest
import torch
from torch import Tensor, nn

from foldrank import LowRankConfig, LowRankLinear, ResidualConfig, factorize_, fold_, fold_state_dict
from foldrank.core.config import EXPANSIONS, Expansion
from foldrank.core.functional import literal_residual
from foldrank.core.inventory import low_rank_layers
from foldrank.core.residual import DuplicatedLatentResidual
from foldrank.surgery.factorize import describe

from .models import TOKENS, TinyLM, assert_unchanged, relative_rms, residual_of, snapshot, train


def low_rank(residual: ResidualConfig, dtype: torch.dtype = torch.float32) -> TinyLM:
    torch.manual_seed(0)
    model = TinyLM().to(dtype)
    factorize_(model, LowRankConfig(rank=3, activation="silu", residual=residual))
    return model


class UpWithResidual(nn.Linear):
    """The paper's equation on activations, in place of an up-projection."""

    def __init__(self, up: nn.Linear, index: Tensor, c: Tensor) -> None:
        super().__init__(up.in_features, up.out_features)
        self.weight, self.bias, self.index, self.c = up.weight, up.bias, index, c

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name is torch's
        return super().forward(input) + literal_residual(input, self.index, self.c)


def set_alpha(model: nn.Module, value: float) -> None:
    for module in model.modules():
        if isinstance(module, DuplicatedLatentResidual):
            module.set_alpha(value)


@pytest.mark.parametrize("expansion", EXPANSIONS)
@pytest.mark.parametrize("variance_correction", [False, True])
def test_gradient_of_alpha_in_a_whole_model_equals_that_of_the_literal_form(
    expansion: Expansion, variance_correction: bool
) -> None:
    config = ResidualConfig(alpha=0.7, trainable=True, expansion=expansion, variance_correction=variance_correction)
    model = low_rank(config, torch.float64)
    literal = copy.deepcopy(model)
    alphas: dict[str, Tensor] = {}
    for name, layer in low_rank_layers(literal).items():
        residual, alphas[name] = residual_of(layer), torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
        index, k = residual.latent_index(), math.ceil(layer.out_features / layer.rank)
        c = alphas[name] / math.sqrt(k) if variance_correction else alphas[name]
        layer.residual = None
        layer.up = UpWithResidual(layer.up, index, c)
    torch.testing.assert_close(model(TOKENS), literal(TOKENS), rtol=1e-12, atol=1e-12)
    model(TOKENS).square().sum().backward()
    literal(TOKENS).square().sum().backward()
    assert len(alphas) == 10
    for name, layer in low_rank_layers(model).items():
        gradient, expected = residual_of(layer).alpha.grad, alphas[name].grad
        assert expected is not None
        assert expected.abs() > 0
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_there_is_one_scalar_per_layer_and_it_is_no_matrix() -> None:
    model = low_rank(ResidualConfig(trainable=True))
    alphas = {name: parameter for name, parameter in model.named_parameters() if name.endswith("alpha")}
    assert alphas.keys() == {f"{name}.residual.alpha" for name in low_rank_layers(model)}
    # What decides on weight decay, here and in most training scripts, is whether a parameter has two dimensions.
    assert {(parameter.dim(), parameter.numel()) for parameter in alphas.values()} == {(1, 1)}


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_model_with_residuals_on_some_layers_folds(dtype: torch.dtype, trainable: bool) -> None:
    alphas, scope = {"q_proj": 0.5, r".*mlp.*": 2.0}, [r"layers\.0\..*", "down_proj"]
    config = ResidualConfig(alpha=alphas, scope=scope, trainable=trainable)
    model = low_rank(config, dtype)
    train(model, TOKENS)
    having = ["0.self_attn.q_proj", "0.mlp.up_proj", "0.mlp.down_proj", "1.mlp.down_proj"]
    expected, state = model(TOKENS), model.state_dict()
    without = {name: layer.up.weight.clone() for name, layer in low_rank_layers(model).items() if not layer.residual}
    folded = fold_state_dict(state)
    assert list(fold_(model).errors) == [f"layers.{name}" for name in having]
    assert relative_rms(model(TOKENS), expected) <= (1e-14 if dtype == torch.float64 else 1e-6)
    assert len(without) == 6
    assert all(torch.equal(low_rank_layers(model)[name].up.weight, weight) for name, weight in without.items())
    assert folded.keys() == model.state_dict().keys()
    assert all(torch.equal(folded[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_another_alpha_acts_at_once_and_everywhere(expansion: Expansion, trainable: bool) -> None:
    model = low_rank(ResidualConfig(alpha=1.0, expansion=expansion, trainable=trainable))
    at_one = model(TOKENS)
    set_alpha(model, 0.25)
    built = low_rank(ResidualConfig(alpha=0.25, expansion=expansion, trainable=trainable))
    assert torch.equal(model(TOKENS), built(TOKENS))
    assert not torch.equal(model(TOKENS), at_one)
    actual, expected = model.state_dict(), built.state_dict()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())
    assert trainable or repr(model) == repr(built)
    built.load_state_dict(actual)
    set_alpha(model, 1.0)
    assert torch.equal(model(TOKENS), at_one)
    set_alpha(model, 0.25)
    folded = fold_state_dict(model.state_dict())
    fold_(model)
    fold_(built)
    for key, value in built.state_dict().items():
        assert torch.equal(folded[key], value)
        assert torch.equal(model.state_dict()[key], value)


def test_another_alpha_is_part_of_the_description_and_of_what_loads() -> None:
    model = low_rank(ResidualConfig(alpha=1.0))
    saved = model.state_dict()
    set_alpha(model, -2)
    described = describe(model)
    assert described is not None
    assert described.residual == ResidualConfig(alpha=-2.0)
    with pytest.raises(RuntimeError, match=r"was saved with \{'alpha': 1.0"):
        model.load_state_dict(saved)
    set_alpha(model, 1.0)
    model.load_state_dict(saved)


def test_alpha_zero_switches_the_residual_off() -> None:
    layer = LowRankLinear(8, 10, 4, residual=ResidualConfig())
    residual_of(layer).set_alpha(0.0)
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), layer.up(layer.down(x)))


def test_a_trainable_alpha_trains_on_from_where_it_was_set() -> None:
    layer = LowRankLinear(8, 10, 4, residual=ResidualConfig(trainable=True))
    residual = residual_of(layer)
    parameter = residual.alpha
    residual.set_alpha(0.5)
    assert residual.alpha is parameter
    train(layer, torch.randn(3, 8))
    assert parameter.item() != 0.5
    assert DuplicatedLatentResidual.decode(residual.spec)["alpha"] is None


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_alpha_must_be_finite(value: float, trainable: bool) -> None:
    layer = LowRankLinear(8, 10, 4, residual=ResidualConfig(trainable=trainable))
    before = snapshot(layer)
    with pytest.raises(ValueError, match="alpha must be a finite number"):
        residual_of(layer).set_alpha(value)
    assert_unchanged(layer, before)


def test_compiled_code_follows_alpha() -> None:
    torch.compiler.reset()
    layer = LowRankLinear(8, 10, 4, activation="silu", residual=ResidualConfig())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 8)
    for alpha in (1.0, 0.25, 3.0):
        residual_of(layer).set_alpha(alpha)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_alpha_can_be_set_on_any_device(device: str) -> None:
    residual = DuplicatedLatentResidual(10, 4, device=device)
    residual.set_alpha(0.125)
    assert residual.spec.device.type == device
    assert residual.coefficient() == pytest.approx(0.125 / math.sqrt(3))


def test_an_alpha_that_is_set_each_step_leaves_nothing_behind() -> None:
    layer = LowRankLinear(8, 10, 4, residual=ResidualConfig())
    x = torch.randn(3, 8)

    def tensors_alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    layer(x)
    before = tensors_alive()
    for step in range(50):
        residual_of(layer).set_alpha(1 / (step + 1))
        layer(x).sum().backward()
        layer.zero_grad()
    assert tensors_alive() <= before + 1
