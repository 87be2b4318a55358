"""Low-rank layers from weights that exist, against numpy in float64."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from foldrank import LowRankConfig, ResidualConfig, factorize_, fold_
from foldrank.core.inventory import low_rank_layers
from foldrank.core.linear import LowRankLinear
from foldrank.surgery import approximation
from foldrank.surgery.approximation import approximate_, input_moments, low_rank_factors
from foldrank.surgery.sparse import SparseLowRankLinear

DLR = ResidualConfig(alpha=0.7)
EXTRAS = {
    "plain": {},
    "residual": {"residual": DLR},
    "scale": {"scale": 0.25},
    "residual and scale": {"residual": replace(DLR, signs="random", trainable=True), "scale": "trainable"},
}


def truncated(W: Tensor, rank: int) -> Tensor:
    U, S, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
    return torch.from_numpy((U[:, :rank] * S[:rank]) @ Vh[:rank])


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(7, 12, 3), (12, 7, 7), (9, 9, 1), (5, 8, 5)])
def test_factors_are_the_truncated_svd_shared_out_evenly(rows: int, columns: int, rank: int) -> None:
    W = matrix(rows, columns)
    A, B = low_rank_factors(W, rank)
    assert (A.shape, B.shape) == ((rank, columns), (rows, rank))
    torch.testing.assert_close(B @ A, truncated(W, rank), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(A @ A.mT, B.mT @ B, rtol=1e-10, atol=1e-10)


def test_large_weights_are_approximated_at_random_and_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximation, "EXACT_UP_TO", 8)
    W = matrix(300, 200) @ torch.diag(torch.linspace(2, 0, 200, dtype=torch.float64) ** 4)
    state = torch.get_rng_state()
    one, again, other = (low_rank_factors(W, 20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])
    best = (W - truncated(W, 20)).norm()
    assert best <= (W - one[1] @ one[0]).norm() <= 1.001 * best


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_computes_the_approximation_whatever_is_on_it(extra: dict[str, Any], bias: bool) -> None:
    W, b, x = matrix(7, 12), matrix(1, 7)[0] if bias else None, matrix(5, 12, 1)
    layer = LowRankLinear(12, 7, 3, bias=bias, name="layer", dtype=torch.float64, **extra)
    approximate_(layer, W, b)
    expected = nn.functional.linear(x, truncated(W, 3), b)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    fold_(layer)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def small(rank: int | None, seed: int = 0, **how: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 9, bias=False), nn.Tanh(), nn.Linear(9, 6))
    model = model.double()
    if rank is not None:
        factorize_(model, LowRankConfig(rank=rank, targets=["0", "2", "4"], residual=DLR), **how)
    return model


def test_full_rank_gives_the_dense_outputs() -> None:
    x, dense, model = matrix(20, 12), small(None), small(None)
    ranks = {"0": 9, "2": 9, "4": 6}
    factorize_(model, LowRankConfig(rank=ranks, residual=DLR), init="svd")
    torch.testing.assert_close(model(x), dense(x), rtol=1e-10, atol=1e-10)


def test_the_sample_makes_outputs_on_inputs_like_it_better() -> None:
    mix = torch.diag(torch.linspace(3, 0.05, 12, dtype=torch.float64)) @ torch.linalg.qr(matrix(12, 12))[0]
    sample, held_out = matrix(4000, 12, 1) @ mix, matrix(4000, 12, 2) @ mix
    expected = small(None)(held_out).detach()
    errors = {}
    for init in ("svd", "activations"):
        model = small(3, init=init, sample=sample.split(500))
        errors[init] = float((model(held_out).detach() - expected).square().mean())
    assert errors["activations"] < 0.8 * errors["svd"]


def test_the_whitened_factors_are_the_best_on_the_sample() -> None:
    W, x = matrix(7, 12), matrix(500, 12, 3) @ matrix(12, 12, 4)
    A, B = low_rank_factors(W, 3, moment=x.mT @ x / 500)
    best = float((x @ (W - B @ A).mT).square().sum())
    for seed in range(20):
        other = B @ A + 1e-2 * truncated(matrix(7, 12, 10 + seed), 3)
        moved = truncated(other, 3)
        assert best < float((x @ (W - moved).mT).square().sum())
    # The optimum in closed form: the discarded singular values of W C^(1/2).
    values = np.linalg.svd((x @ W.mT).numpy(), compute_uv=False)
    assert best == pytest.approx(float((values[3:] ** 2).sum()), rel=1e-4)


@pytest.mark.parametrize("extra", [{}, {"residual": DLR}], ids=["plain", "residual"])
def test_regression_is_the_least_squares_solution_behind_the_function(extra: dict[str, Any]) -> None:
    dense, model, x = small(None), small(None), matrix(400, 12)
    config = LowRankConfig(rank=4, targets=["0"], activation="silu", **extra)
    factorize_(model, config, init="regression", sample=x.split(100))
    layer: Any = model.get_submodule("0")
    A, B = layer.down.weight, layer.effective_weight(layer.up.weight)
    latents = x @ A.mT
    assert latents.square().mean(0).sqrt().tolist() == pytest.approx([1.0] * 4, rel=1e-4)
    y = x @ dense.get_parameter("0.weight").mT
    best, *_ = np.linalg.lstsq(nn.functional.silu(latents).detach().numpy(), y.detach().numpy(), rcond=None)
    torch.testing.assert_close(B, torch.from_numpy(best.T), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.up.bias, dense.get_parameter("0.bias"))
    assert all(not module._forward_pre_hooks for module in dense.modules())


def test_regression_is_near_the_linear_approximation_and_far_from_a_fresh_start() -> None:
    x = matrix(2000, 12)
    expected = small(None)(x).detach()

    def error(activation: Any, **how: Any) -> float:
        model = small(None)
        factorize_(model, LowRankConfig(rank=5, targets=["0", "2", "4"], activation=activation), **how)
        return float((model(x).detach() - expected).square().mean())

    linear = error(None, init="activations", sample=x.split(500))
    near = error("silu", init="regression", sample=x.split(500))
    assert linear < near < 0.1 * error("silu")


def test_moments_are_those_of_the_inputs() -> None:
    model, x = small(None), matrix(30, 12)
    found = input_moments(model, ["0", "4"], [x[:10], {"input": x[10:]}])
    torch.testing.assert_close(found["0"], x.mT @ x / 30, rtol=1e-5, atol=1e-6)
    inner = model[:4](x)  # pyright: ignore[reportIndexIssue]
    torch.testing.assert_close(found["4"], inner.mT @ inner / 30, rtol=1e-5, atol=1e-6)
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_gpt2_whose_weights_lie_the_other_way() -> None:
    torch.manual_seed(0)
    tokens = torch.arange(12).reshape(2, 6)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=2, n_head=2, n_positions=8)).eval()
    with torch.no_grad():
        expected = model(tokens).logits
        factorize_(model, LowRankConfig(rank={"c_attn": 8, "c_fc": 8, "c_proj": 8}), init="svd")
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(low_rank_layers(model)) == 8


@pytest.mark.parametrize(
    ("config", "how", "message"),
    [
        (LowRankConfig(rank=3, activation="silu"), {"init": "svd"}, "0: no factors approximate a weight with a silu"),
        (LowRankConfig(rank=3, backbone="sltrain"), {"init": "svd"}, "approximate a weight with SparseLowRankLinear"),
        (LowRankConfig(rank=3), {"init": "activations"}, "the sample never reaches 0"),
        (LowRankConfig(rank=3), {"init": "regression"}, "0: init regression is for low rank with a function between"),
        (LowRankConfig(rank=3, activation="silu"), {"init": "regression"}, "the sample never reaches 0"),
        (LowRankConfig(rank=3), {"init": "best"}, "init must be svd, activations, regression or None"),
    ],
)
def test_what_has_no_such_start_is_refused_and_nothing_changes(
    config: LowRankConfig, how: dict[str, Any], message: str
) -> None:
    model = small(None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        factorize_(model, config, **how)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(ValueError, match="no factors approximate"):
        approximate_(SparseLowRankLinear(8, 6, 2), torch.zeros(6, 8))
