"""What users do with a module: copy, pickle, compile, autocast, checkpoint, materialise from meta, export."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foldrank import LowRankConfig, LowRankLinear, ResidualConfig, factorize_, fold_
from foldrank.core.config import EXPANSIONS, Expansion

from .models import TOKENS, TinyLM, assert_unchanged, relative_rms, residual_of, snapshot, train


@pytest.fixture
def _fresh_compiler() -> None:
    # Graphs of one test do not count against the recompile limit of the next.
    torch.compiler.reset()


def trained_layer(
    expansion: Expansion = "contiguous", *, trainable: bool = True, dtype: torch.dtype = torch.float32
) -> LowRankLinear:
    torch.manual_seed(0)
    config = ResidualConfig(alpha=0.7, expansion=expansion, trainable=trainable)
    layer = LowRankLinear(32, 50, 16, activation="silu", bias=True, residual=config, dtype=dtype)
    train(layer, torch.randn(8, 32, dtype=dtype))
    layer.zero_grad()
    return layer


def gradients(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs, and the gradients of x and each parameter."""
    x = x.clone().requires_grad_()
    y = forward(x)
    return y.detach(), list(torch.autograd.grad(y.square().sum(), [x, *module.parameters()]))


def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = copy.deepcopy(module)
    for value in fresh.state_dict().values():
        value.zero_()
    # The spec too is zero now, and comes back: it is compared with the config, not with the buffer.
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_a_copy_is_equal_and_independent(
    expansion: Expansion, fold: bool, through: Callable[[nn.Module], nn.Module]
) -> None:
    layer = trained_layer(expansion)
    if fold:
        fold_(layer)
    x = torch.randn(3, 32)
    before, expected = snapshot(layer), layer(x)
    duplicate = through(layer)
    assert repr(duplicate) == repr(layer)
    assert torch.equal(duplicate(x), expected)
    fold_(duplicate)
    train(duplicate, x)
    assert_unchanged(layer, before)
    assert torch.equal(layer(x), expected)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_compiles_to_one_graph_that_follows_the_fold(expansion: Expansion, trainable: bool) -> None:
    layer = trained_layer(expansion, trainable=trainable)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 32)
    torch.testing.assert_close(gradients(layer, compiled, x), gradients(layer, layer, x))
    expected = layer(x)
    fold_(layer)
    torch.testing.assert_close(compiled(x), expected)
    assert len(gradients(layer, compiled, x)[1]) == 4


# Inductor itself imports what torch has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("threads", [1, 2])
def test_inductor_agrees(threads: int) -> None:
    # A width that K = 11 does not divide, large enough for more than one thread.
    layer = LowRankLinear(32, 2736, 256, activation="silu", residual=ResidualConfig())
    x = torch.randn(3, 32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compiled = torch.compile(layer, fullgraph=True)
        torch.testing.assert_close(gradients(layer, compiled, x), gradients(layer, layer, x))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("trainable", [False, True])
def test_autocast_computes_in_bf16_and_keeps_float32_weights(trainable: bool) -> None:
    layer = trained_layer(trainable=trainable)
    x = torch.randn(64, 32)
    expected, expected_gradients = gradients(layer, layer, x)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    assert forward(x).dtype == torch.bfloat16
    y, actual_gradients = gradients(layer, lambda x: forward(x).float(), x)
    assert relative_rms(y, expected) <= 5e-3
    for actual, wanted in zip(actual_gradients, expected_gradients, strict=True):
        assert actual.dtype == torch.float32
        assert relative_rms(actual, wanted) <= 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_autocast_gives_the_dtype_of_the_folded_layer(dtype: torch.dtype) -> None:
    layer = trained_layer(dtype=dtype)
    x = torch.randn(3, 32, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        fold_(layer)
        expected = layer(x)
    assert y.dtype == expected.dtype
    assert relative_rms(y, expected) <= 5e-3


@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_activation_checkpointing_changes_nothing(expansion: Expansion) -> None:
    layer = trained_layer(expansion, dtype=torch.float64)
    x = torch.randn(3, 32, dtype=torch.float64)

    def forward(x: Tensor) -> Tensor:
        y = checkpoint(layer, x, use_reentrant=False)
        assert isinstance(y, Tensor)
        return y

    y, grads = gradients(layer, forward, x)
    expected, expected_grads = gradients(layer, layer, x)
    assert torch.equal(y, expected)
    assert all(torch.equal(*pair) for pair in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_a_layer_from_meta_resets_as_one_built_in_place(expansion: Expansion) -> None:
    def build(device: str) -> LowRankLinear:
        config = ResidualConfig(alpha=0.7, trainable=True, expansion=expansion)
        with torch.device(device):
            return LowRankLinear(32, 50, 16, bias=True, residual=config, name="layer")

    layer = build("meta")
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    layer.to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(77)
    built = build("cpu")
    for either in (layer, built):
        torch.manual_seed(0)
        either.reset_parameters()
    actual, expected = layer.state_dict(), built.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_a_model_from_meta_takes_a_state_dict() -> None:
    config = LowRankConfig(rank=3, activation="silu", residual=ResidualConfig(expansion="random", trainable=True))
    source = TinyLM()
    factorize_(source, config)
    with torch.device("meta"):
        model = TinyLM()
        factorize_(model, config)
    assert all(tensor.is_meta for tensor in itertools.chain(model.parameters(), model.buffers()))
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model(TOKENS), source(TOKENS))
    fold_(model)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_exports(expansion: Expansion, fold: bool) -> None:
    layer = trained_layer(expansion)
    if fold:
        fold_(layer)
    x = torch.randn(3, 32)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    if fold:
        assert operators == ["aten.linear.default", "aten.silu.default", "aten.linear.default"]
        assert set(program.state_dict) == {"down.weight", "up.weight", "up.bias"}
    else:
        assert operators.count("aten.linear.default") == 2
        assert "aten.eq.Tensor" in operators  # R, made on the weight: of what index, of which column


def test_casts_reach_the_factors_and_alpha_alone() -> None:
    layer = trained_layer("random").to(torch.bfloat16)
    residual = residual_of(layer)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    assert (residual.spec.dtype, residual.latent_index().dtype) == (torch.uint8, torch.int64)
    assert layer(torch.randn(3, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
