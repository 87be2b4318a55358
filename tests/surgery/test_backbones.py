"""Each backbone, with and without scale and residual, against the equations as they are written; and a new backbone."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldrank import (
    LowRankConfig,
    LowRankLinear,
    ResidualConfig,
    SparseLowRankLinear,
    factorize_,
    fold_,
    fold_state_dict,
    fold_weight,
)
from foldrank.core.config import Activation, Scale
from foldrank.core.fold import unfolded_keys
from foldrank.core.functional import literal_residual
from foldrank.core.scale import LowRankScale
from foldrank.surgery.backbones import BACKBONES
from foldrank.surgery.factorize import describe, low_rank_layers

from ..core.models import TOKENS, TinyLM, assert_unchanged, relative_rms, snapshot, train

# (d_in, d_out, r) and leading dimensions: r does not divide d_out, is above it, is 1; bias where d_in is even.
CASES = [((7, 11, 3), (2, 3)), ((8, 4, 7), ()), ((6, 6, 1), (0, 2))]
SCALES: list[Scale | None] = [None, 0.3, "trainable"]
RESIDUALS = [None, ResidualConfig(alpha=0.7), ResidualConfig(alpha=0.7, trainable=True, expansion="random")]
METHODS: dict[str, dict[str, Any]] = {
    "low rank": {},
    "CoLA": {"activation": "silu"},
    "SLTrain": {"backbone": "sltrain", "extra_config": {"density": 0.2}},
    "SLTrain, tanh": {"backbone": "sltrain", "extra_config": {"density": 0.2, "seed": 3}, "activation": "tanh"},
}
FUNCTIONS: dict[Activation | None, Any] = {None: lambda z: z, "silu": F.silu, "tanh": torch.tanh}

method = pytest.mark.parametrize("method", METHODS)
scale = pytest.mark.parametrize("scale", SCALES)
residual = pytest.mark.parametrize("residual", RESIDUALS, ids=["plain", "dlr", "dlr, trainable and random"])


def layer_of(method: str, shape: tuple[int, int, int], **others: Any) -> LowRankLinear:
    fields = dict(METHODS[method])
    layer = BACKBONES[fields.pop("backbone", "lowrank")]
    return layer(*shape, **fields.pop("extra_config", {}), **fields, **others)


def literal(layer: LowRankLinear, x: Tensor, leaves: dict[str, Tensor]) -> Tensor:
    """y = B z + c Expand(z) + S x + b with z = s act(A x), S a dense matrix filled entry by entry."""
    s: Any = leaves["scale.theta"].tanh() if "scale.theta" in leaves else 1.0
    if layer.scale is not None and layer.scale.start != "trainable":
        s = layer.scale.start
    z = s * FUNCTIONS[layer.activation_name](x @ leaves["down.weight"].T)
    y = z @ leaves["up.weight"].T
    if layer.residual is not None:
        alpha = leaves.get("residual.alpha", 0.7)
        c = alpha / math.sqrt(math.ceil(layer.out_features / layer.rank))
        y = y + literal_residual(z, layer.residual.latent_index(), c)
    if isinstance(layer, SparseLowRankLinear):
        sparse = torch.zeros(layer.out_features, layer.in_features, dtype=x.dtype)
        for value, (row, column) in zip(leaves["values"], entries(layer), strict=True):
            place = torch.zeros_like(sparse)
            place[row, column] = 1
            sparse = sparse + value * place
        y = y + x @ sparse.T
    return y + leaves["up.bias"] if "up.bias" in leaves else y


def entries(layer: SparseLowRankLinear) -> list[tuple[int, int]]:
    rows, columns = layer.rows.tolist(), layer.columns.tolist()
    return [(row, columns[n]) for row in range(layer.out_features) for n in range(rows[row], rows[row + 1])]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "leading"), CASES)
@residual
@scale
@method
def test_equals_the_literal_equation_in_outputs_and_all_gradients(
    method: str,
    scale: Scale | None,
    residual: ResidualConfig | None,
    shape: tuple[int, int, int],
    leading: tuple[int, ...],
    training: bool,
) -> None:
    bias = shape[0] % 2 == 0
    layer = layer_of(method, shape, scale=scale, residual=residual, bias=bias, dtype=torch.float64, name="layer")
    train(layer, torch.randn(4, shape[0], dtype=torch.float64))  # or SLTrain's B would be zero
    layer.zero_grad()
    layer.train(training)
    x = torch.randn(*leading, shape[0], dtype=torch.float64, requires_grad=True)
    leaves: dict[str, Tensor] = {"x": x, **dict(layer.named_parameters())}
    copies = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    y, expected = layer(x), literal(layer, copies["x"], copies)
    assert y.shape == (*leading, shape[1])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    expected.backward(cotangent)
    for name, leaf in leaves.items():
        torch.testing.assert_close(
            leaf.grad, copies[name].grad, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


def model_of(method: str, scale: Scale | None, residual: ResidualConfig | None, **others: Any) -> TinyLM:
    torch.manual_seed(0)
    model = TinyLM()
    factorize_(model, LowRankConfig(rank=3, scale=scale, residual=residual, **METHODS[method], **others))
    return model


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 5e-3)]
)
@residual
@scale
@method
def test_folds_exactly(
    method: str, scale: Scale | None, residual: ResidualConfig | None, dtype: torch.dtype, tolerance: float
) -> None:
    model = model_of(method, scale, residual).to(dtype)
    train(model, TOKENS)
    model.eval()
    expected, state = model(TOKENS), {key: value.clone() for key, value in model.state_dict().items()}
    report = fold_(model)
    assert bool(report.errors) == bool(scale or residual) == bool(unfolded_keys(state))
    assert relative_rms(model(TOKENS), expected) <= tolerance
    plain = model_of(method, None, None)
    assert repr(model) == repr(plain)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not any(isinstance(module, LowRankScale) for module in model.modules())
    folded = fold_state_dict(state)
    assert list(folded) == list(model.state_dict())
    assert all(torch.equal(folded[key], value) for key, value in model.state_dict().items())
    assert not fold_(model).errors


@residual
@scale
@method
def test_a_described_model_can_be_rebuilt_and_takes_the_state(
    method: str, scale: Scale | None, residual: ResidualConfig | None
) -> None:
    model = model_of(method, scale, residual)
    train(model, TOKENS)
    described = describe(model)
    assert described is not None
    rebuilt = TinyLM()
    factorize_(rebuilt, LowRankConfig.from_dict(json.loads(json.dumps(described.to_dict()))))
    assert repr(rebuilt) == repr(model)
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(TOKENS), model(TOKENS))
    fold_(model)
    described = describe(model)
    assert described is not None
    assert (described.scale, described.residual) == (None, None)


def test_the_other_layers_start_equal_whatever_the_backbone() -> None:
    states = [model_of(method, scale, None).state_dict() for method in METHODS for scale in SCALES]
    kept = [key for key in states[0] if "_proj" not in key]
    assert kept
    assert all(torch.equal(state[key], states[0][key]) for state in states for key in kept)


@pytest.mark.parametrize("scale", [0.3, "trainable"])
def test_a_state_says_whether_its_scale_is_folded(scale: Scale) -> None:
    model, plain = model_of("CoLA", scale, None), model_of("CoLA", None, None)
    with pytest.raises(RuntimeError, match=r"q_proj is folded and the state dict is not: .* model with the scale"):
        plain.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"q_proj has a scale and the state dict is folded: .* a second time"):
        model.load_state_dict(plain.state_dict())
    other = model_of("CoLA", 0.4, None)
    with pytest.raises(RuntimeError, match=r"scale was saved with \{'scale': 0.4\} .* build the model with the scale"):
        model.load_state_dict(other.state_dict())
    plain.load_state_dict(fold_state_dict(model.state_dict()))


def test_a_trainable_scale_starts_at_tanh_of_one_and_learns() -> None:
    layer = LowRankLinear(8, 10, 4, scale="trainable")

    def s() -> float:
        return math.tanh(layer.get_parameter("scale.theta").item())

    assert s() == pytest.approx(math.tanh(1))
    train(layer, torch.randn(3, 8))
    assert s() != pytest.approx(math.tanh(1))
    layer.reset_parameters()
    assert s() == pytest.approx(math.tanh(1))
    assert "with scale" in repr(layer)
    assert "s=tanh(theta), started at 0.7616" in repr(layer)
    assert "s=0.5" in repr(LowRankLinear(8, 10, 4, scale=0.5))


def test_the_fold_of_a_scale_is_rounded_once() -> None:
    weight = torch.randn(12, 4, dtype=torch.bfloat16)
    folded = fold_weight(weight, alpha=0.7, scale=0.3)
    assert torch.equal(folded, (fold_weight(weight.float(), alpha=0.7) * 0.3).bfloat16())
    assert not torch.equal(folded, fold_weight(weight, alpha=0.7) * 0.3)
    with pytest.raises(ValueError, match="scale holds NaN or infinity"):
        fold_weight(weight, scale=torch.tensor(math.nan))


def test_a_trainable_scale_that_is_not_whole_or_not_finite_is_refused() -> None:
    layer = LowRankLinear(8, 10, 4, scale="trainable")
    state = layer.state_dict()
    del state["scale.theta"]
    with pytest.raises(ValueError, match=r"has a scale but no scale\.theta: it is not whole"):
        fold_state_dict(state)
    with torch.no_grad():
        layer.get_parameter("scale.theta").fill_(math.nan)
    with pytest.raises(ValueError, match=r"scale\.theta holds NaN"):
        fold_(layer)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"backbone": "monarch"}, "backbone must be one of lowrank, sltrain.*, got 'monarch'"),
        ({"extra_config": {"density": 0.1}}, "extra_config of the backbone lowrank: .*'density'"),
        (
            {"backbone": "sltrain", "extra_config": {"sparsity": 0.1}},
            "extra_config of the backbone sltrain: .*'sparsity'",
        ),
        ({"backbone": "sltrain", "extra_config": {"density": 0}}, r"density must lie in \(0, 1\], got 0"),
        ({"backbone": "sltrain", "extra_config": {"density": "x"}}, r"density must lie in \(0, 1\], got 'x'"),
    ],
)
def test_what_a_backbone_does_not_take_is_refused_and_nothing_is_changed(
    fields: dict[str, Any], complaint: str
) -> None:
    model = TinyLM()
    before = snapshot(model)
    with pytest.raises(ValueError, match=complaint):
        factorize_(model, LowRankConfig(rank=3, **fields))
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"scale": 0}, "scale must be None, 'trainable' or a finite number other than 0, got 0"),
        ({"scale": "learned"}, "got 'learned'"),
        ({"scale": math.inf}, "got inf"),
        ({"extra_config": {"density": None}}, "extra_config: 'density' must be a number"),
        ({"extra_config": [0.1]}, r"extra_config must be a table from name to value, got \[0.1\]"),
    ],
)
def test_the_config_refuses(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^LowRankConfig: .*{complaint}"):
        LowRankConfig(rank=3, **fields)


def test_a_budget_counts_the_values_of_the_sparse_part() -> None:
    model = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 200))
    report = factorize_(
        model, LowRankConfig(budget=0.5, targets=["0", "1"], backbone="sltrain", extra_config={"density": 0.1})
    )
    assert 0.49 < report.params_after / report.params_before <= 0.5


class SkipLinear(LowRankLinear):
    """y = B z + g x[:d_out]: a learned gain on a shortcut from input to output."""

    def __init__(self, *args: Any, start: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.start = start
        self.gain = nn.Parameter(self.down.weight.new_full((1,), start))

    @property
    def extra_config(self) -> dict[str, bool | int | float | str]:
        return {"start": self.start}

    def forward(self, x: Tensor) -> Tensor:
        width = min(self.in_features, self.out_features)
        return super().forward(x) + F.pad(self.gain * x[..., :width], (0, self.out_features - width))


@pytest.fixture
def _skip_backbone() -> Iterator[None]:
    BACKBONES["skip"] = SkipLinear
    yield
    del BACKBONES["skip"]


@pytest.mark.usefixtures("_skip_backbone")
@residual
@scale
def test_a_further_backbone_is_a_class_and_an_entry(scale: Scale | None, residual: ResidualConfig | None) -> None:
    model = TinyLM()
    config = LowRankConfig(rank=3, backbone="skip", extra_config={"start": 0.25}, scale=scale, residual=residual)
    factorize_(model, config)
    layers = low_rank_layers(model).values()
    assert {type(layer) for layer in layers} == {SkipLinear}
    assert {float(layer.get_parameter("gain").detach()) for layer in layers} == {0.25}
    train(model, TOKENS)
    described = describe(model)
    assert described is not None
    rebuilt = TinyLM()
    factorize_(rebuilt, described)
    rebuilt.load_state_dict(model.state_dict())
    expected = model(TOKENS)
    assert torch.equal(rebuilt(TOKENS), expected)
    fold_(rebuilt)
    torch.testing.assert_close(rebuilt(TOKENS), expected)


def test_a_class_without_an_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="SkipLinear is no backbone with a name: enter it in"):
        describe(nn.Sequential(SkipLinear(8, 8, 2)))
