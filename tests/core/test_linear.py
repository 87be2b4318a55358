import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.nn import functional as F

from foldrank import LowRankLinear, ResidualConfig
from foldrank.core.config import EXPANSIONS, Activation, Expansion
from foldrank.core.functional import literal_residual

from .models import relative_rms, residual_of, train

ALPHA = 0.7  # float32 cannot hold it
# (d_in, d_out, r), leading dimensions: r divides d_out or not, above d_out, 1; no to three leading dimensions.
CASES = [
    ((8, 12, 4), (3,)),
    ((8, 10, 4), ()),
    ((7, 11, 3), (2, 3)),
    ((5, 3, 7), (2, 1, 3)),
    ((5, 3, 7), ()),
    ((6, 6, 1), (4,)),
    ((3, 1, 2), (0, 2)),
    ((7, 11, 3), (2, 100)),
]


def literal_forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    alpha: Tensor | float,
    index: Tensor,
    *,
    corrected: bool,
    activation: Activation | None,
) -> Tensor:
    """The equation on activations: y = B z + c Expand(z) + b, z = act(A x)."""
    z = x @ a.T
    z = F.silu(z) if activation == "silu" else z
    c = alpha / math.sqrt(math.ceil(b.shape[0] / b.shape[1])) if corrected else alpha
    y = z @ b.T + literal_residual(z, index, c)
    return y if bias is None else y + bias


def literal_index(layer: LowRankLinear, expansion: Expansion) -> Tensor:
    d_out, r = layer.out_features, layer.rank
    if expansion == "random":
        return residual_of(layer).latent_index()
    k = math.ceil(d_out / r)
    return torch.tensor([o // k if expansion == "contiguous" else o * r // d_out for o in range(d_out)])


@pytest.mark.parametrize("cast", [False, True], ids=["float64", "to float64"])
@pytest.mark.parametrize("trainable", [False, True], ids=["fixed", "trainable"])
@pytest.mark.parametrize("corrected", [False, True], ids=["raw", "corrected"])
@pytest.mark.parametrize(("activation", "bias"), [(None, False), ("silu", True)])
@pytest.mark.parametrize("expansion", EXPANSIONS)
@pytest.mark.parametrize(("shape", "leading"), CASES)
def test_equals_the_literal_equation_in_outputs_and_all_gradients(
    shape: tuple[int, int, int],
    leading: tuple[int, ...],
    expansion: Expansion,
    activation: Activation | None,
    bias: bool,
    corrected: bool,
    trainable: bool,
    cast: bool,
) -> None:
    config = ResidualConfig(alpha=ALPHA, trainable=trainable, variance_correction=corrected, expansion=expansion)
    dtype = torch.float32 if cast else torch.float64
    layer = LowRankLinear(*shape, activation=activation, bias=bias, residual=config, name="layer", dtype=dtype).double()
    x = torch.randn(*leading, shape[0], dtype=torch.float64, requires_grad=True)
    leaves = {"x": x, **dict(layer.named_parameters())}
    copies = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}

    y = layer(x)
    expected = literal_forward(
        copies["x"],
        copies["down.weight"],
        copies["up.weight"],
        copies.get("up.bias"),
        copies.get("residual.alpha", ALPHA),
        literal_index(layer, expansion),
        corrected=corrected,
        activation=activation,
    )
    assert y.shape == (*leading, shape[1])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    expected.backward(cotangent)
    assert set(leaves) == {"x", "down.weight", "up.weight"} | ({"up.bias"} if bias else set()) | (
        {"residual.alpha"} if trainable else set()
    )
    for name, leaf in leaves.items():
        torch.testing.assert_close(
            leaf.grad, copies[name].grad, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_gradients_can_be_differentiated_again(expansion: Expansion, trainable: bool) -> None:
    config = ResidualConfig(alpha=ALPHA, expansion=expansion, trainable=trainable)
    layer = LowRankLinear(3, 5, 2, activation="silu", bias=True, residual=config, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(forward, (x, *parameters))


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_bf16_stays_near_the_literal_equation(expansion: Expansion, trainable: bool) -> None:
    torch.manual_seed(0)
    config = ResidualConfig(alpha=ALPHA, expansion=expansion, trainable=trainable)
    layer = LowRankLinear(96, 160, 24, activation="silu", bias=True, residual=config, dtype=torch.bfloat16)
    train(layer, torch.randn(32, 96, dtype=torch.bfloat16))
    x = torch.randn(64, 96, dtype=torch.bfloat16, requires_grad=True)
    leaves = {"x": x, **dict(layer.named_parameters())}
    copies = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    layer.zero_grad()
    y = layer(x)
    expected = literal_forward(
        copies["x"],
        copies["down.weight"],
        copies["up.weight"],
        copies["up.bias"],
        copies.get("residual.alpha", ALPHA),
        literal_index(layer, expansion),
        corrected=True,
        activation="silu",
    )
    # Not orthogonal to Expand(z): a gradient of alpha that cancels to nothing has no relative error to speak of.
    duplicates = copies["x"] @ copies["down.weight"].T
    cotangent = torch.randn_like(y) + duplicates.detach()[..., literal_index(layer, expansion)].relu().bfloat16()
    y.backward(cotangent)
    expected.backward(cotangent.double())
    assert y.dtype == torch.bfloat16
    assert relative_rms(y, expected) <= 5e-3
    for name, leaf in leaves.items():
        grad, expected_grad = leaf.grad, copies[name].grad
        assert grad is not None
        assert expected_grad is not None
        assert relative_rms(grad, expected_grad) <= 5e-3, name


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("tokens", [4, 2000])
def test_backward_keeps_no_more_than_one_copy_of_up_beyond_the_plain_layer(tokens: int, trainable: bool) -> None:
    def kept(residual: ResidualConfig | None) -> int:
        """Bytes that autograd keeps and that were not there before."""
        layer = LowRankLinear(16, 50, 12, activation="silu", bias=True, residual=residual)
        tensors: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda saved: tensors.append(saved) or saved, lambda saved: saved
        ):
            layer(torch.randn(tokens, 16))
        state = {tensor.data_ptr() for tensor in layer.state_dict().values()}
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.data_ptr() not in state}.values())

    copy_of_up, index, scalar = 50 * 12 * 4, 50 * 8, 4
    assert kept(ResidualConfig(trainable=trainable)) - kept(None) <= copy_of_up + index + scalar


@pytest.mark.parametrize("tokens", [1, 3, 300])
def test_no_number_of_tokens_is_a_case_of_its_own(tokens: int) -> None:
    layer = LowRankLinear(4, 1000, 5, residual=ResidualConfig(), bias=True)
    y = layer(torch.randn(tokens, 4))
    assert type(y.grad_fn).__name__ == "AddmmBackward0"  # PyTorch's own
    assert y.grad_fn is not None
    with pytest.raises(RuntimeError, match="dtype"):  # as a plain layer does
        layer(torch.randn(tokens, 4, dtype=torch.bfloat16))


def test_alpha_zero_is_the_plain_layer() -> None:
    plain = LowRankLinear(8, 10, 4)
    layer = LowRankLinear(8, 10, 4, residual=ResidualConfig(alpha=0.0))
    layer.down, layer.up = plain.down, plain.up
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_factors_are_drawn_alike_with_and_without_a_residual(expansion: Expansion) -> None:
    torch.manual_seed(0)
    plain = LowRankLinear(8, 10, 4, bias=True)
    torch.manual_seed(0)
    layer = LowRankLinear(8, 10, 4, bias=True, residual=ResidualConfig(expansion=expansion))
    for name, parameter in plain.named_parameters():
        assert torch.equal(layer.get_parameter(name), parameter)


@contextmanager
def nan_in_uninitialised_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_initialisation_is_that_of_cola() -> None:
    torch.manual_seed(0)
    with nan_in_uninitialised_memory():
        layer = LowRankLinear(300, 500, 100, bias=True, residual=ResidualConfig(trainable=True, alpha=ALPHA))
    std = 100**-0.25 * 800**-0.25
    for factor in (layer.down.weight.detach(), layer.up.weight.detach()):
        assert float(factor.std()) == pytest.approx(std, rel=0.02)
        assert abs(float(factor.mean())) < 0.02 * std
        assert float(factor.abs().max()) > 3 * std
    bound = 500**-0.5
    assert 0.9 * bound < float(layer.up.bias.detach().abs().max()) <= bound
    assert residual_of(layer).alpha.tolist() == pytest.approx([ALPHA])


def test_reset_parameters_sets_everything_anew() -> None:
    config = ResidualConfig(alpha=ALPHA, trainable=True, expansion="random", seed=5)
    layer = LowRankLinear(8, 10, 4, bias=True, residual=config, name="layer")
    torch.manual_seed(1)
    layer.reset_parameters()
    fresh = {key: value.clone() for key, value in layer.state_dict().items()}
    for value in layer.state_dict().values():
        value.zero_()
    torch.manual_seed(1)
    layer.reset_parameters()
    assert {key for key, value in layer.state_dict().items() if not torch.equal(value, fresh[key])} == set()


def test_only_the_random_expansion_depends_on_the_name() -> None:
    def index(expansion: Expansion, name: str) -> Tensor:
        config = ResidualConfig(expansion=expansion)
        return residual_of(LowRankLinear(8, 40, 4, residual=config, name=name)).latent_index()

    assert not torch.equal(index("random", "a"), index("random", "b"))
    assert torch.equal(index("balanced", "a"), index("balanced", "b"))


@pytest.mark.parametrize(
    ("name", "module"), [("silu", nn.SiLU), ("gelu", nn.GELU), ("relu", nn.ReLU), ("tanh", nn.Tanh)]
)
def test_activations(name: Activation, module: type[nn.Module]) -> None:
    layer = LowRankLinear(8, 10, 4, activation=name)
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), layer.up(module()(layer.down(x))))


def test_without_residual_a_swapped_factor_is_called() -> None:
    layer = LowRankLinear(8, 10, 4, activation="silu", bias=True)
    x = torch.randn(3, 8)
    y = layer(x)
    layer.up = nn.Sequential(layer.up, nn.Hardtanh(-0.1, 0.1))  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(layer(x), y.clamp(-0.1, 0.1))


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_below_one_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank must be at least 1, got {rank}"):
        LowRankLinear(8, 10, rank)


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="None or one of silu, gelu, relu, tanh, got 'swish'"):
        LowRankLinear(8, 10, 4, activation="swish")  # pyright: ignore[reportArgumentType]


def test_repr_tells_whether_there_is_a_residual() -> None:
    assert "rank=4, with residual" in repr(LowRankLinear(8, 10, 4, residual=ResidualConfig()))
    assert "rank=4, folded or never with a residual" in repr(LowRankLinear(8, 10, 4))
