"""What people put on a factor of an unfolded layer: computed as the literal equation says, or refused by name."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.nn.utils.parametrize import register_parametrization

from foldrank import LowRankConfig, LowRankLinear, ResidualConfig, SparseLowRankLinear, factorize_, fold_
from foldrank.core.config import EXPANSIONS, Expansion
from foldrank.core.functional import literal_residual
from foldrank.core.plain_linear import what_is_on

from .models import assert_unchanged, residual_of, snapshot, train

peft = pytest.importorskip("peft", reason="needs the extra finetune")

SHAPE = 7, 11, 3
TOLERANCE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def layer_of(
    expansion: Expansion = "contiguous", *, trainable: bool = False, scale: Any = None, kind: type = LowRankLinear
) -> LowRankLinear:
    torch.manual_seed(0)
    config = ResidualConfig(alpha=0.7, expansion=expansion, trainable=trainable)
    layer = kind(*SHAPE, bias=True, residual=config, scale=scale, name="layer", dtype=torch.float64)
    train(layer, torch.randn(5, SHAPE[0], dtype=torch.float64))
    layer.zero_grad()
    return layer


def literal(layer: LowRankLinear, x: Tensor, up: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """y = up(s z) + c Expand(s z), with `up` as it stands."""
    z = layer.latents(x)
    if layer.scale is not None:
        z = z * layer.scale.coefficient()
    residual = residual_of(layer)
    values = residual.terms(z)[1]
    return (up or layer.up)(z) + literal_residual(z, residual.latent_index(), values)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def on_hooks(up: nn.Linear) -> None:
    up.register_forward_hook(lambda _module, _inputs, output: output.tanh())  # pyright: ignore[reportArgumentType]


def on_pre_hook(up: nn.Linear) -> None:
    up.register_forward_pre_hook(lambda _module, inputs: (inputs[0] + 1,))


def on_forward(up: nn.Linear) -> None:
    up.forward = lambda input: F.linear(input, up.weight, up.bias).tanh()  # noqa: A006


def on_weight_norm(up: nn.Linear) -> None:
    parametrizations.weight_norm(up)


def on_old_weight_norm(up: nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        weight_norm(up)


def on_spectral_norm(up: nn.Linear) -> None:
    parametrizations.spectral_norm(up)


def on_pruning(up: nn.Linear) -> None:
    prune.l1_unstructured(up, "weight", 0.3)


def on_parametrization(up: nn.Linear) -> None:
    register_parametrization(up, "weight", Doubled())


ON_UP: dict[str, Callable[[nn.Linear], None]] = {
    "forward hook": on_hooks,
    "forward pre-hook": on_pre_hook,
    "another forward": on_forward,
    "weight norm": on_weight_norm,
    "old weight norm": on_old_weight_norm,
    "spectral norm": on_spectral_norm,
    "pruning": on_pruning,
    "parametrization": on_parametrization,
}


@pytest.mark.parametrize("scale", [None, 0.5, "trainable"])
@pytest.mark.parametrize("expansion", EXPANSIONS)
@pytest.mark.parametrize("what", ON_UP)
def test_what_is_on_up_is_computed_with_every_gradient(what: str, expansion: Expansion, scale: Any) -> None:
    layer = layer_of(expansion, trainable=True, scale=scale).eval()
    ON_UP[what](layer.up)
    layer.eval()  # spectral norm iterates in training mode
    x = torch.randn(2, 4, SHAPE[0], dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    y, expected = layer(x), literal(layer, x)
    torch.testing.assert_close(y, expected, **TOLERANCE)
    cotangent = torch.randn_like(y)
    for one, other in zip(
        torch.autograd.grad(y, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.mark.parametrize("what", ON_UP)
def test_the_fold_refuses_what_is_on_up_by_name(what: str) -> None:
    model = nn.Sequential(nn.Linear(7, 7), nn.ModuleDict({"inner": layer_of()})["inner"])
    ON_UP[what](model[1].up)  # pyright: ignore[reportArgumentType]
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"1\.up cannot be folded, because its? .*Take it off first"):
        fold_(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("what", [what for what in ON_UP if what != "spectral norm"])  # another weight at each call
@pytest.mark.parametrize("factor", ["up", "down"])
def test_sltrain_asks_the_same_of_both_factors(factor: str, what: str) -> None:
    layer = layer_of(kind=SparseLowRankLinear)
    twin = copy.deepcopy(layer)
    ON_UP[what](layer.get_submodule(factor))  # pyright: ignore[reportArgumentType]
    x = torch.randn(5, SHAPE[0], dtype=torch.float64)
    layer.train()
    sparse = twin(x) - literal(twin, x)
    torch.testing.assert_close(layer(x), literal(layer, x) + sparse, **TOLERANCE)


@pytest.fixture
def _global_hook() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _inputs, output: 2 * output if type(module) is nn.Linear else None
    )
    yield
    handle.remove()


@pytest.mark.usefixtures("_global_hook")
def test_a_hook_on_all_modules_reaches_up() -> None:
    layer = layer_of()
    x = torch.randn(5, SHAPE[0], dtype=torch.float64)
    torch.testing.assert_close(layer(x), literal(layer, x), **TOLERANCE)


def test_adapters_of_peft_train_and_are_refused_by_the_fold_until_they_are_merged() -> None:
    model = nn.Sequential(layer_of("random"), nn.SiLU(), layer_of("balanced", kind=SparseLowRankLinear))
    model[2] = LowRankLinear(11, 5, 2, residual=ResidualConfig(), dtype=torch.float64)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["up", "down"]), model)
    adapters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_(std=0.3)
    x = torch.randn(4, 7, dtype=torch.float64)
    y = model(x)
    expected = literal(model[2], F.silu(literal(model[0], x)))  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(y, expected, **TOLERANCE)
    y.square().sum().backward()
    assert len(adapters) == 8
    for name, parameter in adapters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"0\.up cannot be folded, because it is a Linear of peft"):
        fold_(model)
    assert_unchanged(model, before)
    for layer in (model[0], model[2]):
        for factor in ("up", "down"):
            adapter: Any = layer.get_submodule(factor)
            adapter.merge()
            setattr(layer, factor, adapter.get_base_layer())
    torch.testing.assert_close(model(x), y, **TOLERANCE)
    fold_(model)
    torch.testing.assert_close(model(x), y, **TOLERANCE)


def small_model(**low_rank: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.GELU(), nn.Linear(12, 8, bias=False)).double().eval()
    factorize_(model, LowRankConfig(rank=3, targets=["0", "2"], **low_rank))
    return model


OFFLOADED: dict[str, dict[str, Any]] = {
    "residual": {"residual": ResidualConfig()},
    "random": {"residual": ResidualConfig(expansion="random")},
    "scale": {"scale": 0.5},
    "both": {"residual": ResidualConfig(), "scale": 0.5},
    "trainable scale": {"scale": "trainable"},
    "SLTrain": {"residual": ResidualConfig(), "backbone": "sltrain", "extra_config": {"density": 0.2}},
}


@pytest.mark.parametrize("low_rank", OFFLOADED.values(), ids=OFFLOADED)
def test_offloaded_weights_are_loaded_when_they_are_needed(low_rank: dict[str, Any]) -> None:
    model = small_model(**low_rank)
    x = torch.randn(4, 8, dtype=torch.float64)
    expected = model(x).detach()
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    for _ in range(2):
        torch.testing.assert_close(offloaded(x), expected, **TOLERANCE)
    before = {name: id(module) for name, module in offloaded.named_modules()}
    with pytest.raises(ValueError, match=r"offloaded|its forward is replaced|hooks"):
        fold_(offloaded)
    assert {name: id(module) for name, module in offloaded.named_modules()} == before


@pytest.mark.parametrize("low_rank", OFFLOADED.values(), ids=OFFLOADED)
def test_a_device_map_with_a_layer_on_the_disk(low_rank: dict[str, Any], tmp_path: Any) -> None:
    model = small_model(**low_rank)
    x = torch.randn(4, 8, dtype=torch.float64)
    expected = model(x).detach()
    dispatched = dispatch_model(model, {"0": "cpu", "1": "cpu", "2": "disk"}, offload_dir=tmp_path, force_hooks=True)
    torch.testing.assert_close(dispatched(x), expected, **TOLERANCE)


def test_a_trainable_alpha_that_is_offloaded_is_refused_by_name() -> None:
    model = small_model(residual=ResidualConfig(trainable=True))
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="the residual's alpha or index is offloaded, where"):
        offloaded(torch.randn(4, 8, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.* are deprecated:UserWarning")
@pytest.mark.parametrize("scale", [None, 0.5])
def test_dynamic_quantization_of_unfolded_layers(scale: float | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)).eval()
    factorize_(model, LowRankConfig(rank=6, targets=["0", "2"], residual=ResidualConfig(), scale=scale))
    x = torch.randn(32, 16)
    expected = model(x).detach()
    folded = copy.deepcopy(model)
    fold_(folded)
    quantized, plain = (
        torch.ao.quantization.quantize_dynamic(one, {nn.Linear}, dtype=torch.qint8) for one in (model, folded)
    )
    assert type(quantized[0].up).__module__.endswith("quantized.dynamic.modules.linear")
    # The rounding of int8 itself, of B alone here and of B* in the folded model.
    assert (quantized(x) - expected).norm() <= 1.5 * (plain(x) - expected).norm()
    torch.testing.assert_close(quantized[0](x), literal(quantized[0], x))
    with pytest.raises(ValueError, match=r"0\.up cannot be folded, because it is a Linear of torch"):
        fold_(quantized)


@pytest.mark.parametrize("tokens", [3, 300])
@pytest.mark.parametrize("kind", [LowRankLinear, SparseLowRankLinear])
def test_transforms_of_functions_give_the_gradients_of_autograd(kind: type[LowRankLinear], tokens: int) -> None:
    layer = layer_of(trainable=True, kind=kind)
    parameters = dict(layer.named_parameters())
    x = torch.randn(tokens, SHAPE[0], dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().sum()

    layer(x).square().sum().backward()
    for name, gradient in torch.func.grad(loss)({k: p.detach() for k, p in parameters.items()}, x).items():
        torch.testing.assert_close(gradient, parameters[name].grad, **TOLERANCE)

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    for name, gradient in each({k: p.detach() for k, p in parameters.items()}, x[:, None]).items():
        torch.testing.assert_close(gradient.sum(0), parameters[name].grad, rtol=1e-10, atol=1e-10)

    batched = torch.func.vmap(layer)(x.unflatten(0, (3, -1)))
    torch.testing.assert_close(batched.flatten(0, 1), layer(x), **TOLERANCE)


@pytest.mark.parametrize("kind", [LowRankLinear, SparseLowRankLinear])
def test_an_ensemble_is_mapped_over_its_weights(kind: type[LowRankLinear]) -> None:
    layers = [layer_of(kind=kind) for _ in range(3)]
    for layer in layers:
        train(layer, torch.randn(5, SHAPE[0], dtype=torch.float64))
    parameters, buffers = torch.func.stack_module_state(layers)  # pyright: ignore[reportArgumentType]
    x = torch.randn(5, SHAPE[0], dtype=torch.float64)

    def forward(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(layers[0], (parameters, buffers), (x,))

    shared = {name: buffer[0] for name, buffer in buffers.items()}
    found = torch.func.vmap(forward, in_dims=(0, None))(parameters, shared)
    torch.testing.assert_close(found, torch.stack([layer(x) for layer in layers]), **TOLERANCE)


@pytest.mark.parametrize("tokens", [3, 300])
@pytest.mark.parametrize("kind", [LowRankLinear, SparseLowRankLinear])
def test_the_meta_device_gives_shapes(kind: type[LowRankLinear], tokens: int) -> None:
    with torch.device("meta"):
        layer = kind(*SHAPE, residual=ResidualConfig(trainable=True, expansion="random"), scale="trainable")
    y = layer(torch.empty(2, tokens, SHAPE[0], device="meta"))
    assert (y.shape, y.is_meta) == ((2, tokens, SHAPE[1]), True)


def test_nothing_is_on_a_plain_layer_and_the_reason_names_what_is() -> None:
    assert what_is_on(nn.Linear(2, 3)) is None
    assert what_is_on(nn.LazyLinear(3)) == "it is a LazyLinear of torch"
    tagged = nn.Linear(2, 3)
    tagged.weight = type("Tagged", (nn.Parameter,), {})(torch.ones(3, 2))
    assert what_is_on(tagged) == "its weight is a Tagged"
    assert what_is_on(nn.Linear(2, 3, device="meta")) == "its weight is offloaded, or on the meta device"
