import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foldrank import LowRankConfig, LowRankLinear, ResidualConfig, factorize_, fold_, fold_state_dict, fold_weight
from foldrank.core.config import EXPANSIONS, Expansion
from foldrank.core.functional import literal_residual
from foldrank.core.residual import DuplicatedLatentResidual

from .models import TOKENS, TinyLM, assert_unchanged, relative_rms, residual_of, snapshot, train

SPECS = [
    ResidualConfig(),
    ResidualConfig(alpha=0.7, variance_correction=False, expansion="balanced"),
    ResidualConfig(alpha=-0.7, expansion="random"),
    ResidualConfig(alpha=0.7, trainable=True),
    ResidualConfig(alpha={"q_proj": 0.5, r".*\.mlp\..*": 2}, trainable=True, expansion="random"),
]
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 5e-3}


def trained_model(residual: ResidualConfig | None, dtype: torch.dtype = torch.float32) -> TinyLM:
    torch.manual_seed(0)
    model = TinyLM().to(dtype)
    factorize_(model, LowRankConfig(rank=3, activation="silu", residual=residual))
    train(model, TOKENS)
    return model


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("residual", SPECS)
def test_outputs_change_by_rounding_only(residual: ResidualConfig, dtype: torch.dtype) -> None:
    model = trained_model(residual, dtype)
    expected = model(TOKENS)
    fold_(model)
    assert relative_rms(model(TOKENS), expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("expansion", EXPANSIONS)
@pytest.mark.parametrize(("out_features", "rank"), [(48, 16), (50, 16), (9, 20)])
def test_folded_layer_is_near_the_literal_equation_of_the_unfolded(
    out_features: int, rank: int, expansion: Expansion, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    config = ResidualConfig(alpha=0.7, expansion=expansion)
    layer = LowRankLinear(32, out_features, rank, bias=True, residual=config, dtype=dtype)
    train(layer, torch.randn(16, 32, dtype=dtype))
    x = torch.randn(64, 32, dtype=dtype)
    with torch.no_grad():
        z = x.double() @ layer.down.weight.double().T
        c = 0.7 / math.sqrt(math.ceil(out_features / rank))
        expected = literal_residual(z, residual_of(layer).latent_index(), c)
        expected += z @ layer.up.weight.double().T + layer.up.bias.double()
    fold_(layer)
    assert relative_rms(layer(x), expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("residual", SPECS)
def test_no_trace_is_left(residual: ResidualConfig) -> None:
    model = trained_model(residual)
    report = fold_(model)
    assert report.errors
    plain = trained_model(None)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in plain.named_buffers()]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not any(isinstance(module, DuplicatedLatentResidual) for module in model.modules())
    assert "with residual" not in repr(model)


@pytest.mark.parametrize("residual", SPECS)
def test_folding_twice_does_nothing(residual: ResidualConfig) -> None:
    model = trained_model(residual)
    fold_(model)
    before = snapshot(model)
    report = fold_(model)
    assert_unchanged(model, before)
    assert (dict(report.errors), report.max_abs_error) == ({}, 0.0)
    assert str(report) == "folded 0 low-rank layers; largest rounding of a weight 0.000e+00"


@pytest.mark.parametrize("model", [TinyLM(), nn.Linear(4, 4), LowRankLinear(8, 10, 4)])
def test_a_model_without_residuals_is_left_alone(model: nn.Module) -> None:
    before = snapshot(model)
    assert not fold_(model).errors
    assert_unchanged(model, before)


def test_parameters_stay_the_same_objects() -> None:
    model = trained_model(ResidualConfig())
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    fold_(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


def test_a_layer_can_be_the_model() -> None:
    layer = LowRankLinear(8, 10, 4, residual=ResidualConfig())
    x = torch.randn(2, 8)
    expected = layer(x)
    assert list(fold_(layer).errors) == [""]
    assert torch.equal(layer(x), expected)


def test_a_shared_layer_is_folded_once() -> None:
    layer = LowRankLinear(8, 8, 4, residual=ResidualConfig())
    model = nn.Sequential(layer, nn.Sequential(layer), layer)
    x = torch.randn(2, 8)
    expected = model(x)
    assert list(fold_(model).errors) == ["0"]
    assert torch.equal(model(x), expected)


def test_a_shared_weight_is_refused() -> None:
    first, second = (LowRankLinear(8, 8, 4, residual=ResidualConfig()) for _ in range(2))
    second.up.weight = first.up.weight
    model = nn.Sequential(first, second)
    before = snapshot(model)
    expected = model(torch.ones(8))
    with pytest.raises(ValueError, match=r"0\.up\.weight is shared .*fold_state_dict"):
        fold_(model)
    assert_unchanged(model, before)
    unshared = nn.Sequential(*(LowRankLinear(8, 8, 4) for _ in range(2)))
    unshared.load_state_dict(fold_state_dict(model.state_dict()))
    torch.testing.assert_close(unshared(torch.ones(8)), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    ["layers.1.mlp.down_proj.up.weight", "layers.0.mlp.up_proj.up.bias", "layers.1.self_attn.k_proj.residual.alpha"],
)
def test_what_is_not_finite_is_refused_before_anything_changes(name: str, bad: float) -> None:
    model = trained_model(ResidualConfig(trainable=True))
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = bad
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity: the training diverged; fold an earlier"):
        fold_(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drift_is_the_rounding_against_the_sum_in_float64(dtype: torch.dtype) -> None:
    layer = LowRankLinear(32, 48, 16, residual=ResidualConfig(alpha=0.7), dtype=dtype)
    weight = layer.up.weight.detach().double()
    exact = fold_weight(weight, alpha=0.7)
    report = fold_(layer)
    error = float((layer.up.weight.detach().double() - exact).abs().max())
    assert report.max_abs_error == error > 0
    assert error <= torch.finfo(dtype).eps * float(exact.abs().max())


def test_report_prints_a_line_per_layer(caplog: pytest.LogCaptureFixture) -> None:
    model = trained_model(ResidualConfig(scope="mlp"))
    with caplog.at_level("INFO", logger="foldrank"):
        report = fold_(model)
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [
        f"layers.{i}.mlp.{name}" for i in (0, 1) for name in ("up_proj", "down_proj")
    ]
    assert lines[-1].startswith("folded 4 low-rank layers; largest rounding of a weight ")
    assert caplog.messages == [report.summary()]


@pytest.mark.parametrize("residual", SPECS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_fold_state_dict_equals_fold_bit_for_bit(residual: ResidualConfig, dtype: torch.dtype) -> None:
    model = trained_model(residual, dtype)
    state = model.state_dict()
    before = snapshot(model)
    folded = fold_state_dict(state)
    assert_unchanged(model, before)
    fold_(model)
    expected = model.state_dict()
    assert list(folded) == list(expected)
    assert all(torch.equal(folded[key], expected[key]) for key in expected)
    again = fold_state_dict(folded)
    assert list(again) == list(folded)
    assert all(again[key] is folded[key] for key in folded)


def test_fold_state_dict_passes_on_what_needs_no_fold() -> None:
    layer = LowRankLinear(8, 10, 4, bias=True, residual=ResidualConfig())
    other = {"step": torch.tensor(3), "head.residual.weight": torch.randn(2), "spec": torch.zeros(1)}
    state = {**layer.state_dict(), **other}
    folded = fold_state_dict(state)
    assert set(folded) == {"down.weight", "up.weight", "up.bias", *other}
    assert all(folded[key] is state[key] for key in folded if key != "up.weight")


@pytest.mark.parametrize(
    ("config", "key", "value", "complaint"),
    [
        (ResidualConfig(), "up.weight", None, "no up.weight: it is not whole"),
        (ResidualConfig(trainable=True), "residual.alpha", None, "no residual.alpha: it is not whole"),
        (ResidualConfig(expansion="random"), "residual.index", None, "no residual.index: it is not whole"),
        (
            ResidualConfig(expansion="random"),
            "residual.index",
            torch.tensor([0, 1]),
            "one latent for each of 10 outputs",
        ),
        (ResidualConfig(), "residual.spec", torch.zeros(5, dtype=torch.uint8), "damaged"),
        (ResidualConfig(), "up.weight", torch.full((10, 4), torch.nan), "weight holds NaN or infinity"),
        (ResidualConfig(trainable=True), "residual.alpha", torch.tensor([torch.nan]), "alpha holds NaN or infinity"),
    ],
)
def test_fold_state_dict_refuses(config: ResidualConfig, key: str, value: Tensor | None, complaint: str) -> None:
    state = LowRankLinear(8, 10, 4, residual=config).state_dict()
    if value is None:
        del state[key]
    else:
        state[key] = value
    with pytest.raises(ValueError, match=complaint):
        fold_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("expansion", EXPANSIONS)
@pytest.mark.parametrize(("out_features", "rank"), [(12, 4), (10, 4), (3, 7)])
def test_fold_weight_in_both_orientations(
    out_features: int, rank: int, expansion: Expansion, dtype: torch.dtype
) -> None:
    weight = torch.randn(out_features, rank).to(dtype)
    index = torch.randint(rank, (out_features,)) if expansion == "random" else None
    kwargs: dict[str, Any] = {"alpha": 0.7, "expansion": expansion, "index": index}
    before = weight.clone()
    folded = fold_weight(weight, **kwargs)
    flipped = fold_weight(weight.T.contiguous(), latent_dim=0, **kwargs)
    assert torch.equal(weight, before)
    assert (folded.dtype, folded.shape) == (dtype, weight.shape)
    assert torch.equal(flipped, folded.T)
    assert flipped.is_contiguous()

    k = math.ceil(out_features / rank)
    latent = (
        index
        if index is not None
        else [o // k if expansion == "contiguous" else o * rank // out_features for o in range(out_features)]
    )
    wide = weight.to(torch.promote_types(dtype, torch.float32), copy=True)
    wide[torch.arange(out_features), torch.as_tensor(latent)] += 0.7 / math.sqrt(k)
    assert torch.equal(folded, wide.to(dtype))


def test_fold_weight_without_variance_correction() -> None:
    assert fold_weight(torch.zeros(3, 2), alpha=0.5, variance_correction=False).tolist() == [
        [0.5, 0],
        [0.5, 0],
        [0, 0.5],
    ]


def test_fold_weight_takes_alpha_as_a_tensor() -> None:
    weight = torch.randn(10, 4)
    assert torch.equal(fold_weight(weight, alpha=torch.tensor([0.5])), fold_weight(weight, alpha=0.5))
    assert torch.equal(
        fold_weight(weight, alpha=torch.tensor(0.5, dtype=torch.bfloat16)), fold_weight(weight, alpha=0.5)
    )


@pytest.mark.parametrize(
    ("weight", "kwargs", "complaint"),
    [
        (torch.zeros(4), {}, r"takes a matrix and latent_dim 0 or 1, got \(4,\) and 1"),
        (torch.zeros(4, 2), {"latent_dim": 2}, r"got \(4, 2\) and 2"),
        (torch.tensor([[torch.inf]]), {}, "weight holds NaN or infinity"),
        (torch.zeros(4, 2), {"alpha": math.nan}, "alpha holds NaN or infinity"),
        (torch.zeros(4, 2), {"index": torch.tensor([0])}, r"one latent for each of 4 outputs, got \(1,\)"),
        (torch.zeros(4, 2), {"expansion": "random"}, "random"),
    ],
)
def test_fold_weight_refuses(weight: Tensor, kwargs: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        fold_weight(weight, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found_wherever_it_stands(bad: float, dtype: torch.dtype) -> None:
    weight = torch.full(
        (5, 29), torch.finfo(dtype).max, dtype=dtype
    )  # the largest numbers, whose sum would be infinite
    fold_weight(weight, alpha=0.0)
    for place in range(weight.numel()):
        damaged = weight.clone()
        damaged.view(-1)[place] = bad
        with pytest.raises(ValueError, match="weight holds NaN or infinity"):
            fold_weight(damaged)


def test_a_weight_shared_with_the_root_is_refused() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = LowRankLinear(8, 8, 4, residual=ResidualConfig())
            self.tied = self.layer.up.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) @ self.tied

    model = Root()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer\.up\.weight is shared with another module \(tied\)"):
        fold_(model)
    assert_unchanged(model, before)


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(LowRankLinear(8, 8, 4, residual=ResidualConfig()))
    with pytest.raises(ValueError, match=r"0\.up cannot be folded, because its weight is offloaded, or on the meta"):
        fold_(model)


@pytest.mark.parametrize("index", [[0, 4] * 5, [-1, 0] * 5])
def test_an_index_out_of_range_is_refused(index: list[int]) -> None:
    with pytest.raises(ValueError, match=r"index must lie in \[0, 4\)"):
        fold_weight(torch.zeros(10, 4), index=torch.tensor(index))
