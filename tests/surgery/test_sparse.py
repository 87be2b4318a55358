"""SLTrain's layer: its support, its start, what it keeps in memory, and what users do with a module."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from foldrank import LowRankConfig, LowRankLinear, ResidualConfig, SparseLowRankLinear, factorize_, fold_
from foldrank.surgery.sparse import flat_support, random_support

from ..core.models import TOKENS, TinyLM, relative_rms, train


@pytest.fixture
def _fresh_compiler() -> None:
    torch.compiler.reset()


def trained(dtype: torch.dtype = torch.float32, **others: Any) -> SparseLowRankLinear:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"bias": True, "scale": 0.5, "residual": ResidualConfig(alpha=0.7), "density": 0.1}
    layer = SparseLowRankLinear(32, 50, 6, dtype=dtype, name="layer", **{**fields, **others})
    train(layer, torch.randn(8, 32, dtype=dtype), steps=2)
    layer.zero_grad()
    return layer


def support_of(layer: SparseLowRankLinear) -> Tensor:
    return flat_support(layer.rows, layer.columns, layer.in_features)


def weight_of(layer: SparseLowRankLinear) -> Tensor:
    """W = s (B + c R) A + S in float64."""
    with torch.no_grad():
        up = layer.up.weight.double()
        weight = layer.effective_weight(up) @ layer.down.weight.double()
        weight.view(-1)[support_of(layer)] += layer.values.double()
    return weight


@pytest.mark.parametrize(
    ("total", "count"), [(10_000, 300), (10_000, 1), (100, 99), (100, 100), (1, 1)], ids=lambda n: f"{n}"
)
def test_the_support_is_distinct_sorted_and_of_the_asked_size(total: int, count: int) -> None:
    support = random_support(total, count, seed=0, name="layer")
    assert support.shape == (count,)
    assert (support.diff() > 0).all()
    assert int(support[0]) >= 0
    assert int(support[-1]) < total


def test_the_support_is_uniform() -> None:
    drawn = torch.zeros(20)
    for seed in range(2000):
        drawn[random_support(20, 5, seed=seed, name="layer")] += 1
    # Each position is drawn 500 times on average, with a standard deviation of 19.4.
    assert drawn.sum() == 10_000
    assert float(drawn.sub(500).abs().max()) < 4.5 * 19.4


def test_the_support_depends_on_seed_and_name_alone() -> None:
    before = torch.random.get_rng_state()
    support = random_support(1000, 30, seed=0, name="a")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(support, random_support(1000, 30, seed=0, name="a"))
    assert not torch.equal(support, random_support(1000, 30, seed=1, name="a"))
    assert not torch.equal(support, random_support(1000, 30, seed=0, name="b"))


@pytest.mark.parametrize(
    ("density", "count"), [(0.03, 48), (0.05, 80), (1.0, 1600), (1, 1600), (1e-9, 1)], ids=lambda n: f"{n}"
)
def test_the_number_of_values_is_that_of_the_published_code(density: float, count: int) -> None:
    layer = SparseLowRankLinear(32, 50, 4, density=density)
    assert layer.values.shape == layer.columns.shape == (count,)
    assert layer.rows.shape == (51,)
    assert int(layer.rows[-1]) == count
    assert {layer.rows.dtype, layer.columns.dtype} == {torch.int32}


def test_the_start_is_that_of_sltrain() -> None:
    torch.manual_seed(0)
    layer = SparseLowRankLinear(400, 300, 40, bias=True, density=0.2)
    assert not layer.up.weight.any()
    for uniform in (layer.down.weight.detach(), layer.values.detach()):
        assert float(uniform.abs().max()) == pytest.approx(400**-0.5, rel=1e-3)
        assert float(uniform.std()) == pytest.approx(400**-0.5 / math.sqrt(3), rel=0.02)
    assert float(layer.up.bias.detach().abs().max()) == pytest.approx(300**-0.5, rel=0.05)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_are_those_of_the_function(training: bool, activation: Any) -> None:
    layer = SparseLowRankLinear(5, 4, 2, density=0.4, activation=activation, bias=True, dtype=torch.float64)
    train(layer, torch.randn(3, 5, dtype=torch.float64))
    layer.train(training)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(call, (x, *parameters))


@pytest.mark.parametrize("activation", [None, "silu"])
def test_no_matrix_of_the_size_of_the_weight_is_kept_for_the_backward_pass(activation: Any) -> None:
    layer = trained(activation=activation)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(torch.randn(3, 32))
    assert kept
    assert max(kept) < 32 * 50 * 4
    y.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_bf16_stays_near_the_matrix(training: bool) -> None:
    layer = trained(torch.bfloat16, bias=False).train(training)
    x = torch.randn(64, 32, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative_rms(y, x.double() @ weight_of(layer).T) <= 5e-3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_autocast_computes_in_bf16_and_keeps_float32_weights(activation: Any, training: bool) -> None:
    layer = trained(activation=activation).train(training)
    x = torch.randn(64, 32)
    expected = layer(x)
    wanted = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative_rms(y, expected) <= 1e-2
    for actual, gradient in zip(
        torch.autograd.grad(y.float().square().sum(), list(layer.parameters())), wanted, strict=True
    ):
        assert actual.dtype == torch.float32
        assert relative_rms(actual, gradient) <= 2e-2


# Dynamo itself instantiates the function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph(training: bool) -> None:
    layer = trained().train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 32)
    y, expected = compiled(x), layer(x)
    torch.testing.assert_close(y, expected)
    parameters = list(layer.parameters())
    actual = torch.autograd.grad(y.square().sum(), parameters)
    torch.testing.assert_close(actual, torch.autograd.grad(expected.square().sum(), parameters))


def test_exports_once_folded() -> None:
    layer = trained().eval()
    fold_(layer)
    x = torch.randn(3, 32)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    for tokens in (x, torch.randn(7, 32)):
        torch.testing.assert_close(program.module()(tokens), layer(tokens))


def test_activation_checkpointing_changes_nothing() -> None:
    layer = trained(torch.float64)
    x = torch.randn(3, 32, dtype=torch.float64)
    parameters = list(layer.parameters())
    y = checkpoint(layer, x, use_reentrant=False)
    assert isinstance(y, Tensor)
    actual = torch.autograd.grad(y.sum(), parameters)
    expected = torch.autograd.grad(layer(x).sum(), parameters)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("through", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_stand_alone(through: Any) -> None:
    layer = trained().eval()
    x = torch.randn(3, 32)
    expected = layer(x)
    duplicate = through(layer)
    assert torch.equal(duplicate(x), expected)
    fold_(duplicate)
    train(duplicate, x)
    assert torch.equal(layer(x), expected)


def test_the_support_comes_with_the_state() -> None:
    source, target = trained(), trained(seed=1)
    assert not torch.equal(support_of(source), support_of(target))
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 32)
    assert torch.equal(target(x), source(x))
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        trained(density=0.2).load_state_dict(source.state_dict())


def test_a_layer_from_meta_resets_as_one_built_in_place() -> None:
    def build(device: str) -> SparseLowRankLinear:
        with torch.device(device):
            return SparseLowRankLinear(32, 50, 4, bias=True, residual=ResidualConfig(), name="layer")

    layer = build("meta")
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    layer.to_empty(device="cpu")
    built = build("cpu")
    for either in (layer, built):
        torch.manual_seed(0)
        either.reset_parameters()
    expected = built.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in layer.state_dict().items())


def test_each_layer_of_a_model_has_its_own_support() -> None:
    def supports(seed: int) -> list[tuple[int, ...]]:
        model = TinyLM(width=32, hidden=32)
        factorize_(model, LowRankConfig(rank=3, backbone="sltrain", extra_config={"seed": seed}))
        found = [tuple(support_of(m).tolist()) for m in model.modules() if isinstance(m, SparseLowRankLinear)]
        assert len(found) == 10
        return found

    assert len(set(supports(0) + supports(1))) == 20
    assert supports(0) == supports(0)


class Doubled(nn.Module):
    """In place of a factor, as an adapter is."""

    def __init__(self, factor: nn.Module) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.factor(x)


@pytest.mark.parametrize("training", [True, False])
def test_swapped_factors_are_called_once_folded(training: bool) -> None:
    layer = trained(torch.float64, bias=False)
    fold_(layer)
    layer.train(training)
    x = torch.randn(3, 32, dtype=torch.float64)
    before = layer(x)
    low_rank = layer.up(layer.down(x))
    layer.up = Doubled(layer.up)  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(layer(x), before + low_rank)


def test_a_model_trains_and_folds() -> None:
    torch.manual_seed(0)
    model = TinyLM()
    factorize_(
        model,
        LowRankConfig(rank=3, backbone="sltrain", extra_config={"density": 0.1}, scale=0.25, residual=ResidualConfig()),
    )
    losses = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    expected = model(TOKENS)
    fold_(model)
    torch.testing.assert_close(model(TOKENS), expected)
    assert all(isinstance(m, SparseLowRankLinear) for m in model.modules() if isinstance(m, LowRankLinear))
