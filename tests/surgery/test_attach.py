"""The residual on low-rank layers that others wrote, in the shapes in which they are published."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from foldrank import (
    LowRankConfig,
    LowRankLinear,
    ResidualConfig,
    attach_residual_,
    factorize_,
    fold_,
    fold_state_dict,
)
from foldrank.core.config import EXPANSIONS, Expansion
from foldrank.core.functional import literal_residual
from foldrank.core.residual import DuplicatedLatentResidual

from ..core.models import assert_unchanged, relative_rms, snapshot, train

IN, OUT, RANK = 12, 10, 4
DLR = ResidualConfig(alpha=0.7)
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 5e-3}
HOW = pytest.mark.parametrize(
    "how", [{"strict": True}, {"strict": False}, {"assign": True}, {"strict": False, "assign": True}], ids=str
)


class Cola(nn.Module):
    """Parameters as in the published CoLA layer: both factors transposed."""

    weights = "cola_b"
    latent_dim = 0

    def __init__(self) -> None:
        super().__init__()
        self.cola_a = nn.Parameter(torch.randn(IN, RANK) / IN**0.5)
        self.cola_b = nn.Parameter(torch.randn(RANK, OUT) / RANK**0.5)
        self.bias = nn.Parameter(torch.randn(OUT))

    def latent(self, x: Tensor) -> Tensor:
        return F.silu(x @ self.cola_a)

    def forward(self, x: Tensor) -> Tensor:
        return self.latent(x) @ self.cola_b + self.bias

    def with_added(self, x: Tensor, added: Callable[[Tensor], Tensor]) -> Tensor:
        return self(x) + added(self.latent(x))


class SLTrain(nn.Module):
    """Parameters as in the published SLTrain layer: the factors multiplied, and a sparse matrix added."""

    weights = "lora_B"
    latent_dim = 1
    scaling = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.randn(RANK, IN) / IN**0.5)
        self.lora_B = nn.Parameter(torch.randn(OUT, RANK) / RANK**0.5)
        self.sparse_value = nn.Parameter(torch.randn(7))
        self.register_buffer("sparse_index", torch.randperm(OUT * IN)[:7])

    def forward(self, x: Tensor) -> Tensor:
        dense = self.lora_B @ self.lora_A * self.scaling
        index = self.get_buffer("sparse_index")
        return x @ dense.flatten().scatter_add(0, index, self.sparse_value).view_as(dense).T

    def with_added(self, x: Tensor, added: Callable[[Tensor], Tensor]) -> Tensor:
        return self(x) + added(x @ self.lora_A.T) * self.scaling


class Peft(nn.Module):
    """Two linear layers beside a frozen one, in the manner of PEFT."""

    weights = "lora_B.weight"
    latent_dim = 1

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(IN, OUT).requires_grad_(False)
        self.lora_A = nn.Linear(IN, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x)) * 0.5

    def with_added(self, x: Tensor, added: Callable[[Tensor], Tensor]) -> Tensor:
        return self(x) + added(self.lora_A(x)) * 0.5


Layer = Cola | SLTrain | Peft
KINDS: list[type[Layer]] = [Cola, SLTrain, Peft]
EACH = pytest.mark.parametrize("kind", KINDS)


def attached(
    kind: type[Layer], config: ResidualConfig = DLR, dtype: torch.dtype = torch.float32, steps: int = 1
) -> nn.Sequential:
    """Two such layers, attached, after one optimizer step."""
    torch.manual_seed(0)
    model = nn.Sequential(kind(), nn.Linear(OUT, IN), kind()).to(dtype)
    attach_residual_(model, kind.weights, config, latent_dim=kind.latent_dim)
    train(model, torch.randn(5, IN, dtype=dtype), steps=steps)
    model.zero_grad()
    return model


def plain(kind: type[Layer], dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(kind(), nn.Linear(OUT, IN), kind()).to(dtype)


def residuals(model: nn.Module) -> list[DuplicatedLatentResidual]:
    return [module for module in model.modules() if isinstance(module, DuplicatedLatentResidual)]


X = torch.linspace(-2, 2, 5 * IN).reshape(5, IN)


@EACH
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_equals_the_literal_equation_in_outputs_and_all_gradients(
    kind: type[Layer], expansion: Expansion, trainable: bool
) -> None:
    torch.manual_seed(0)
    layer = kind().double()
    reference = copy.deepcopy(layer)
    attach_residual_(
        layer, kind.weights, ResidualConfig(alpha=0.7, expansion=expansion, trainable=trainable), kind.latent_dim
    )
    (residual,) = residuals(layer)
    alpha = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    c = alpha / math.sqrt(math.ceil(OUT / RANK))
    x = X.double().requires_grad_()
    actual = layer(x)
    expected = reference.with_added(x, lambda z: literal_residual(z, residual.latent_index(), c))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    ours = {
        name.replace("parametrizations.", "").replace(".original", ""): parameter
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad
    }
    theirs: dict[str, Tensor] = {
        name: parameter for name, parameter in reference.named_parameters() if parameter.requires_grad
    }
    if trainable:
        theirs |= {f"{kind.weights}.0.alpha": alpha}
    assert ours.keys() == theirs.keys()
    got = torch.autograd.grad(actual.square().sum(), [x, *(ours[name] for name in theirs)])
    wanted = torch.autograd.grad(expected.square().sum(), [x, *theirs.values()])
    for gradient, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-10, atol=1e-10)


@EACH
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE.items())
def test_fold_gives_back_the_plain_model(kind: type[Layer], dtype: torch.dtype, tolerance: float) -> None:
    model = attached(kind, ResidualConfig(alpha=0.7, trainable=True, expansion="random"), dtype)
    x = X.to(dtype)
    expected = model(x)
    report = fold_(model)
    assert relative_rms(model(x), expected) <= tolerance
    assert list(report.errors) == [f"0.{kind.weights}", f"2.{kind.weights}"]
    assert not residuals(model)
    fresh = plain(kind, dtype)
    assert [type(module) for module in model.modules()] == [type(module) for module in fresh.modules()]
    assert repr(model) == repr(fresh)
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert all(parameter.is_leaf for parameter in model.parameters())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    before = snapshot(model)
    assert not fold_(model).errors
    assert_unchanged(model, before)


@EACH
def test_the_parameter_stays_the_same_object_all_along(kind: type[Layer]) -> None:
    torch.manual_seed(0)
    model = plain(kind)
    before = {id(parameter): parameter.detach().clone() for parameter in model.parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_residual_(model, kind.weights, DLR, kind.latent_dim)
    assert all(torch.equal(parameter, before[id(parameter)]) for parameter in model.parameters())
    model(X).square().mean().backward()
    optimizer.step()
    fold_(model)
    assert {id(parameter) for parameter in model.parameters()} == before.keys()
    assert not any(torch.equal(p, before[id(p)]) for p in model.parameters() if p.requires_grad)


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("expansion", EXPANSIONS)
@pytest.mark.parametrize("trainable", [False, True])
def test_fold_state_dict_equals_fold_bit_for_bit(
    kind: type[Layer], dtype: torch.dtype, expansion: Expansion, trainable: bool
) -> None:
    model = attached(kind, ResidualConfig(alpha=0.7, expansion=expansion, trainable=trainable), dtype)
    state = fold_state_dict(model.state_dict())
    fold_(model)
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert all(value is state[key] for key, value in fold_state_dict(state).items())


@EACH
def test_the_spec_says_how_the_weight_lies(kind: type[Layer]) -> None:
    model = attached(kind)
    owner, _, own = f"0.{kind.weights}".rpartition(".")
    state = model.state_dict()
    assert (
        DuplicatedLatentResidual.decode(state[f"{owner}.parametrizations.{own}.0.spec"])["latent_dim"]
        == kind.latent_dim
    )
    assert f"{owner}.parametrizations.{own}.original" in state
    assert f"0.{kind.weights}" not in state


@EACH
@HOW
def test_each_kind_of_state_loads_into_its_own_alone(kind: type[Layer], how: dict[str, Any]) -> None:
    source = attached(kind)
    unfolded = {key: value.clone() for key, value in source.state_dict().items()}
    folded = fold_state_dict(unfolded)

    target = attached(kind, steps=3)
    target.load_state_dict(unfolded, **how)
    assert torch.equal(target(X), source(X))
    complaint = (
        rf"0\.{kind.weights} has a residual and the state dict is folded.*before attach_residual_, or after fold_"
    )
    for state in (folded, plain(kind).state_dict()):
        with pytest.raises(RuntimeError, match=complaint):
            target.load_state_dict(state, **how)

    target = attached(kind, steps=3)
    fold_(target)
    with pytest.raises(RuntimeError, match=rf"2\.{kind.weights} is folded and the state dict is not") as caught:
        target.load_state_dict(unfolded, **how)
    assert "fold the state dict first (foldrank.fold_state_dict)" in str(caught.value)
    target.load_state_dict(folded, **how)
    fold_(source)
    assert torch.equal(target(X), source(X))


@EACH
def test_a_model_that_never_had_a_residual_refuses_an_unfolded_state(kind: type[Layer]) -> None:
    with pytest.raises(RuntimeError, match="parametrizations"):
        plain(kind).load_state_dict(attached(kind).state_dict())


@HOW
@pytest.mark.parametrize("other", [ResidualConfig(alpha=1.0), ResidualConfig(alpha=0.7, trainable=True)])
def test_another_residual_does_not_load(other: ResidualConfig, how: dict[str, Any]) -> None:
    state = attached(Cola).state_dict()
    with pytest.raises(RuntimeError, match="was saved with"):
        attached(Cola, other).load_state_dict(state, **how)


def test_the_other_orientation_does_not_load() -> None:
    rows, columns = (nn.Linear(6, 6, bias=False) for _ in range(2))
    attach_residual_(rows, "weight", DLR, latent_dim=1)
    attach_residual_(columns, "weight", DLR, latent_dim=0)
    with pytest.raises(RuntimeError, match=r"was saved with .*'latent_dim': 1.* and this model has .*'latent_dim': 0"):
        columns.load_state_dict(rows.state_dict())


def test_a_partial_state_may_load_with_strict_false() -> None:
    model = attached(Cola)
    model.load_state_dict({"1.bias": torch.ones(IN)}, strict=False)
    assert torch.equal(model.get_parameter("1.bias"), torch.ones(IN))


@EACH
@pytest.mark.parametrize("fold_the_copy", [False, True])
def test_a_copy_is_folded_alone(kind: type[Layer], fold_the_copy: bool) -> None:
    model = attached(kind)
    duplicate = copy.deepcopy(model)
    expected = model(X)
    folded, other = (duplicate, model) if fold_the_copy else (model, duplicate)
    before = snapshot(other)
    fold_(folded)
    assert_unchanged(other, before)
    assert len(residuals(other)) == 2
    assert torch.equal(other(X), expected)
    torch.testing.assert_close(folded(X), expected)
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()
    assert torch.equal(other(X), expected)
    fold_(other)
    torch.testing.assert_close(other(X), expected)
    again = copy.deepcopy(other)
    assert torch.equal(again(X), other(X))
    with pytest.raises(RuntimeError, match="is folded and the state dict is not"):
        again.load_state_dict(attached(kind).state_dict(), strict=False)


@EACH
def test_compiled_code_follows_the_fold(kind: type[Layer]) -> None:
    torch.compiler.reset()
    model = attached(kind, ResidualConfig(alpha=0.7, trainable=True))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(X)
    torch.testing.assert_close(compiled(X), expected)
    compiled(X).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert len(fold_(compiled).errors) == 2  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(compiled(X), expected)
    with torch.no_grad():
        model.get_parameter("1.bias").add_(1.0)
    torch.testing.assert_close(compiled(X), model(X))


def test_initialisers_work_before_and_on_the_original() -> None:
    model = plain(Cola)
    layer = model[0]
    assert isinstance(layer, Cola)
    nn.init.constant_(layer.cola_b, 2.0)
    attach_residual_(model, "cola_b", ResidualConfig(alpha=3.0, variance_correction=False), latent_dim=0)
    assert layer.cola_b.unique().tolist() == [2.0, 5.0]
    nn.init.constant_(layer.get_parameter("parametrizations.cola_b.original"), 1.0)
    assert layer.cola_b.unique().tolist() == [1.0, 4.0]
    zeros = torch.zeros(RANK, OUT)
    for value, error in ((zeros, RuntimeError), (nn.Parameter(zeros), KeyError)):
        with pytest.raises(error, match=r"does not implement right_inverse|already exists"):
            setattr(layer, "cola_b", value)  # noqa: B010
    assert layer.cola_b.unique().tolist() == [1.0, 4.0]


@EACH
@pytest.mark.parametrize("save", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
def test_pickling_is_a_clear_error_until_the_fold(kind: type[Layer], save: Callable[[nn.Module], Any]) -> None:
    model = attached(kind)
    with pytest.raises(RuntimeError, match=r"only supported through state_dict\(\)"):
        save(model)
    fold_(model)
    save(model)
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), model(X))


def test_both_kinds_of_residual_are_folded_at_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Cola(), nn.ModuleDict({"up_proj": nn.Linear(OUT, IN)})["up_proj"], Peft())
    factorize_(model, LowRankConfig(rank=3, targets=["1"], residual=DLR))
    attach_residual_(model, ["lora_B.weight"], DLR)
    attach_residual_(model, ["cola_b"], DLR, latent_dim=0)
    train(model, X)
    expected, state = model(X), fold_state_dict(model.state_dict())
    assert set(fold_(model).errors) == {"0.cola_b", "1", "2.lora_B.weight"}
    torch.testing.assert_close(model(X), expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_one_weight_of_many_and_alpha_by_pattern() -> None:
    model = nn.ModuleDict({name: Cola() for name in ("attn", "mlp", "out")})
    config = ResidualConfig(alpha={r"attn\..*": 0.5, "cola_b": 2.0}, scope=[r"(attn|mlp)\..*"])
    report = attach_residual_(model, r".*cola.*b", config, latent_dim=0)
    assert {weight.name: weight.alpha for weight in report.attached} == {"attn.cola_b": 0.5, "mlp.cola_b": 2.0}
    assert dict(report.skipped) == {"out.cola_b": "outside of the residual's scope, or not in its table of alphas"}
    assert str(report).splitlines() == [
        "weight       shape    alpha",
        "attn.cola_b  4 -> 10  0.5",
        "mlp.cola_b   4 -> 10  2",
        "out.cola_b   skipped  outside of the residual's scope, or not in its table of alphas",
        "gave 2 of 3 weights a residual, skipped out.cola_b",
    ]
    assert list(fold_(model).errors) == ["attn.cola_b", "mlp.cola_b"]


def test_the_named_scopes_work_on_names_of_parameters() -> None:
    model = nn.ModuleDict({"attn": nn.ModuleDict({"q": Cola()}), "mlp": nn.ModuleDict({"up": Cola()})})
    report = attach_residual_(model, "cola_b", ResidualConfig(scope="attention"), latent_dim=0)
    assert [weight.name for weight in report.attached] == ["attn.q.cola_b"]


def test_random_expansions_differ_from_weight_to_weight() -> None:
    model = attached(Cola, ResidualConfig(expansion="random"))
    first, second = residuals(model)
    assert not torch.equal(first.latent_index(), second.latent_index())


def test_a_shared_module_gets_one_residual() -> None:
    layer = nn.Linear(4, 6, bias=False)
    model = nn.ModuleDict({"a": layer, "b": layer})
    assert [weight.name for weight in attach_residual_(model, "weight", DLR).attached] == ["a.weight"]
    assert model["a"] is model["b"]
    assert list(fold_(model).errors) == ["a.weight"]


def test_the_module_that_holds_the_weight_can_be_the_model() -> None:
    model = Cola()
    attach_residual_(model, "cola_b", DLR, latent_dim=0)
    expected = model(X)
    state = fold_state_dict(model.state_dict())
    assert list(fold_(model).errors) == ["cola_b"]
    torch.testing.assert_close(model(X), expected)
    assert torch.equal(state["cola_b"], model.cola_b)
    assert type(model) is Cola


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_device_and_dtype_are_kept(device: str, dtype: torch.dtype) -> None:
    model = plain(Cola).to(device=device, dtype=dtype)
    attach_residual_(model, "cola_b", ResidualConfig(trainable=True, expansion="random"), latent_dim=0)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {tensor.device.type for tensor in model.state_dict().values()} == {device}
    assert model(X.to(device=device, dtype=dtype)).dtype == dtype


def test_other_parametrizations_of_the_module_stay() -> None:
    layer = Cola()
    parametrizations.orthogonal(layer, "cola_a")
    attach_residual_(layer, "cola_b", DLR, latent_dim=0)
    duplicate = copy.deepcopy(layer)
    expected = layer(X)
    assert list(fold_(duplicate).errors) == ["cola_b"]
    torch.testing.assert_close(duplicate(X), expected)
    assert torch.equal(layer(X), expected)
    assert parametrize.is_parametrized(duplicate, "cola_a")
    assert not parametrize.is_parametrized(duplicate, "cola_b")
    assert isinstance(duplicate.cola_b, nn.Parameter)
    assert parametrize.is_parametrized(layer, "cola_b")
    torch.testing.assert_close(duplicate.cola_a.T @ duplicate.cola_a, torch.eye(RANK))


def refused() -> nn.ModuleDict:
    model = nn.ModuleDict({"cola": Cola(), "tied": nn.Linear(4, 8), "tie": nn.Linear(4, 8), "normed": nn.Linear(4, 8)})
    model["tied"].weight = model["tie"].weight
    parametrizations.weight_norm(model["normed"])
    model["low"] = LowRankLinear(8, 6, 2)
    return model


@pytest.mark.parametrize(
    ("names", "config", "latent_dim", "complaint"),
    [
        (
            "cola_c",
            DLR,
            0,
            "names: 'cola_c' matches no weight that can have a residual here; the nearest .*cola_b",
        ),
        (["cola_b", "nothing"], DLR, 0, "names: 'nothing' matches no weight"),
        ([], DLR, 0, "names is empty"),
        ("cola_b", DLR, 2, "latent_dim must be 1 .* or 0 .*, got 2"),
        ("cola_b", DLR, 1, r"cola.cola_b \(4, 10\) would have rank 10 above d_out 4 .*\(latent_dim=0\)"),
        (["cola_b", "cola_a"], DLR, 0, r"cola.cola_a \(12, 4\) would have rank 12 above d_out 4"),
        ("cola.bias", DLR, 0, r"only cola.bias: torch.float32 \(10,\) is no matrix"),
        ("tie.weight", DLR, 1, "only tie.weight: it is shared with another module"),
        ("normed.weight", DLR, 1, "only normed.weight: it is already parametrized"),
        ("low.up.weight", DLR, 1, "only low.up.weight: it is in a LowRankLinear: give factorize_ a config"),
        ("cola_b", ResidualConfig(scope=["q_proj"]), 0, "config.scope: 'q_proj' matches no named weight here"),
        ("cola_b", ResidualConfig(alpha={"q": 1.0}), 0, "config.alpha: 'q' matches no named weight here"),
        (
            ["cola_b", "cola_a"],
            ResidualConfig(alpha={"cola_b": 1.0}, scope=["cola_a"]),
            0,
            "rank 12 above|together name none",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(
    names: str | list[str], config: ResidualConfig, latent_dim: int, complaint: str
) -> None:
    model = refused()
    before, kinds = snapshot(model), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=complaint):
        attach_residual_(model, names, config, latent_dim)
    assert_unchanged(model, before)
    assert [type(module) for module in model.modules()] == kinds


def test_attaching_twice_is_refused() -> None:
    model = attached(Cola)
    with pytest.raises(ValueError, match=r"only 0\.cola_b: it is already parametrized"):
        attach_residual_(model, "cola_b", DLR, latent_dim=0)


def test_scope_and_alpha_that_name_nothing_together_are_refused() -> None:
    config = ResidualConfig(alpha={"0.cola_b": 1.0}, scope=["2.cola_b"])
    with pytest.raises(ValueError, match="scope and alpha together name none"):
        attach_residual_(plain(Cola), "cola_b", config, latent_dim=0)


def test_what_is_not_finite_is_refused_before_anything_changes() -> None:
    model = attached(Cola, ResidualConfig(trainable=True))
    with torch.no_grad():
        residuals(model)[1].alpha.fill_(math.nan)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"alpha of 2\.cola_b holds NaN or infinity"):
        fold_(model)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="alpha holds NaN or infinity"):
        fold_state_dict(model.state_dict())


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_parametrization_on_top_is_refused_by_the_fold() -> None:
    model = attached(Cola)
    parametrize.register_parametrization(model[2], "cola_b", Twice())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"2\.cola_b has parametrizations beside the residual"):
        fold_(model)
    assert_unchanged(model, before)


def test_a_class_made_after_the_attachment_is_refused_by_the_fold() -> None:
    model = attached(Cola)
    object.__setattr__(model[0], "__class__", type("Sharded", (type(model[0]),), {}))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"0\.cola_b belongs to a Sharded.*foldrank.fold_state_dict"):
        fold_(model)
    assert_unchanged(model, before)


def test_a_weight_shared_after_the_attachment_is_refused_by_the_fold() -> None:
    model = attached(Cola)
    lists = [module for module in model.modules() if isinstance(module, parametrize.ParametrizationList)]
    lists[0].original = lists[1].original
    with pytest.raises(ValueError, match=r"0\.cola_b is shared with another module"):
        fold_(model)


def test_a_line_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="foldrank"):
        attach_residual_(plain(Cola), "cola_b", DLR, latent_dim=0)
    assert caplog.messages == ["gave 2 of 2 weights a residual"]
