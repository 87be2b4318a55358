"""A state dict says by itself whether it is folded, and is never loaded as the other kind (contract 3)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foldrank import (
    LowRankConfig,
    LowRankLinear,
    ResidualConfig,
    SparseLowRankLinear,
    factorize_,
    fold_,
    fold_state_dict,
)
from foldrank.core.config import EXPANSIONS, Expansion

from .models import TOKENS, TinyLM, train

HOW = pytest.mark.parametrize(
    "how", [{"strict": True}, {"strict": False}, {"assign": True}, {"strict": False, "assign": True}], ids=str
)


def model(residual: ResidualConfig | None, seed: int = 0) -> TinyLM:
    torch.manual_seed(seed)
    model = TinyLM()
    factorize_(model, LowRankConfig(rank=3, activation="silu", residual=residual))
    return model


def trained_state(residual: ResidualConfig | None) -> dict[str, Tensor]:
    source = model(residual)
    train(source, TOKENS)
    return {key: value.clone() for key, value in source.state_dict().items()}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_each_kind_loads_into_its_own(expansion: Expansion, trainable: bool, assign: bool) -> None:
    residual = ResidualConfig(alpha=0.7, expansion=expansion, trainable=trainable)
    source = model(residual)
    train(source, TOKENS)
    unfolded = model(residual, seed=1)
    unfolded.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(unfolded(TOKENS), source(TOKENS))
    folded = model(None, seed=1)
    folded.load_state_dict(fold_state_dict(source.state_dict()), assign=assign)
    fold_(source)
    assert torch.equal(folded(TOKENS), source(TOKENS))


@HOW
def test_a_folded_state_does_not_load_into_an_unfolded_model(how: dict[str, Any]) -> None:
    state = fold_state_dict(trained_state(ResidualConfig()))
    with pytest.raises(
        RuntimeError, match=r"layers\.1\.mlp\.up_proj has a residual and the state dict is folded"
    ) as caught:
        model(ResidualConfig()).load_state_dict(state, **how)
    assert "residual=None, before attach_residual_, or after fold_" in str(caught.value)
    assert str(caught.value).count("applied a second time") == 10


@HOW
def test_a_plain_state_does_not_load_into_an_unfolded_model(how: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="applied a second time"):
        model(ResidualConfig()).load_state_dict(trained_state(None), **how)


@HOW
@pytest.mark.parametrize("fold", [False, True])
def test_an_unfolded_state_does_not_load_into_a_folded_model(how: dict[str, Any], fold: bool) -> None:
    target = model(ResidualConfig() if fold else None)
    fold_(target)
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.up_proj is folded and the state dict is not") as caught:
        target.load_state_dict(trained_state(ResidualConfig()), **how)
    assert "foldrank.fold_state_dict" in str(caught.value)


@HOW
def test_one_residual_among_plain_layers_is_enough(how: dict[str, Any]) -> None:
    residual = ResidualConfig(alpha={"layers.1.mlp.down_proj": 1.0})
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.down_proj has a residual") as caught:
        model(residual).load_state_dict(trained_state(None), **how)
    assert str(caught.value).count("has a residual") == 1


@HOW
@pytest.mark.parametrize(
    ("saved", "built"),
    [
        (ResidualConfig(alpha=1.0), ResidualConfig(alpha=2.0)),
        (ResidualConfig(alpha=1.0), ResidualConfig(alpha=1.0, trainable=True)),
        (ResidualConfig(alpha=1.0, trainable=True), ResidualConfig(alpha=1.0)),
        (ResidualConfig(), ResidualConfig(expansion="balanced")),
        (ResidualConfig(expansion="random"), ResidualConfig()),
        (ResidualConfig(), ResidualConfig(variance_correction=False)),
    ],
)
def test_another_residual_does_not_load(saved: ResidualConfig, built: ResidualConfig, how: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"q_proj.residual was saved with \{'alpha': ") as caught:
        model(built).load_state_dict(trained_state(saved), **how)
    assert "build the model with the residual that the checkpoint was trained with" in str(caught.value)


@HOW
@pytest.mark.parametrize("spec", [b"", b"{}", b'{"alpha": 1.0', b"\xff\xfe"])
def test_a_damaged_spec_does_not_load(spec: bytes, how: dict[str, Any]) -> None:
    layer = LowRankLinear(8, 10, 4, residual=ResidualConfig())
    state = {**layer.state_dict(), "residual.spec": torch.tensor(list(spec), dtype=torch.uint8)}
    with pytest.raises((RuntimeError, ValueError), match="damaged"):
        layer.load_state_dict(state, **how)


def test_a_trainable_alpha_and_a_random_index_come_from_the_state() -> None:
    source = LowRankLinear(8, 10, 4, residual=ResidualConfig(alpha=0.7, trainable=True, expansion="random"), name="a")
    train(source, torch.randn(5, 8))
    target = LowRankLinear(8, 10, 4, residual=ResidualConfig(trainable=True, expansion="random", seed=1), name="b")
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(target(x), source(x))


def test_a_state_without_the_layer_may_load_with_strict_false() -> None:
    target = model(ResidualConfig())
    state = trained_state(ResidualConfig())
    rest = {key: value for key, value in state.items() if "_proj" not in key}
    result = target.load_state_dict(rest, strict=False)
    assert set(result.missing_keys) == state.keys() - rest.keys()
    assert torch.equal(target.embed.weight, state["embed.weight"])


@pytest.mark.parametrize("wrap", [lambda layer: nn.Sequential(layer), lambda layer: nn.ModuleDict({"residual": layer})])
def test_the_check_holds_at_any_depth_and_name(wrap: Any) -> None:
    state = wrap(LowRankLinear(8, 10, 4, residual=ResidualConfig())).state_dict()
    plain = wrap(LowRankLinear(8, 10, 4))
    with pytest.raises(RuntimeError, match="is folded and the state dict is not"):
        plain.load_state_dict(state)
    plain.load_state_dict(fold_state_dict(state))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_a_cast_of_the_whole_state_folds_and_loads(expansion: Expansion, dtype: torch.dtype) -> None:
    residual = ResidualConfig(alpha=0.7, expansion=expansion)
    source = model(residual)
    train(source, TOKENS)
    cast = {key: value.to(dtype) for key, value in source.state_dict().items()}
    assert cast["layers.0.mlp.up_proj.residual.spec"].is_floating_point()
    twin = model(residual, seed=1).to(dtype)
    twin.load_state_dict(cast)
    source.to(dtype)
    assert torch.equal(twin(TOKENS), source(TOKENS))
    folded = fold_state_dict(cast)
    fold_(source)
    assert all(torch.equal(folded[key], value) for key, value in source.state_dict().items())


@pytest.mark.parametrize(("dtype", "rank"), [(torch.bfloat16, 300), (torch.float16, 2100)])
def test_an_index_that_a_cast_rounds_is_refused_by_name(dtype: torch.dtype, rank: int) -> None:
    layer = LowRankLinear(4, 2 * rank, rank, residual=ResidualConfig(expansion="random"))
    cast = {key: value.to(dtype) for key, value in layer.state_dict().items()}
    message = rf"residual\.index was cast to {dtype}, which rounds such numbers"
    with pytest.raises(ValueError, match=message):
        fold_state_dict(cast)
    with pytest.raises(RuntimeError, match=message):
        LowRankLinear(4, 2 * rank, rank, residual=ResidualConfig(expansion="random")).load_state_dict(cast)


def test_a_support_that_a_cast_rounds_is_refused_by_name() -> None:
    layer = SparseLowRankLinear(300, 5, 2)
    cast = {key: value.to(torch.bfloat16) for key, value in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"columns was cast to torch.bfloat16, which rounds such numbers"):
        SparseLowRankLinear(300, 5, 2).load_state_dict(cast)


@pytest.mark.parametrize("kind", [LowRankLinear, SparseLowRankLinear])
@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_what_comes_from_the_meta_device_saves_what_folds(expansion: Expansion, kind: type[LowRankLinear]) -> None:
    config = ResidualConfig(alpha=0.7, expansion=expansion)
    with torch.device("meta"):
        layer = kind(30, 40, 9, residual=config, scale=0.5, name="layer")
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():  # an initialisation of one's own, as torchtitan's
        nn.init.normal_(parameter, std=0.02)
    built = kind(30, 40, 9, residual=config, scale=0.5, name="layer")
    for name, buffer in built.named_buffers():
        assert torch.equal(layer.get_buffer(name), buffer), name
    built.load_state_dict(layer.state_dict())
    x = torch.randn(3, 30)
    assert torch.equal(built(x), layer(x))
    folded = fold_state_dict(layer.state_dict())
    fold_(layer)
    assert all(torch.equal(folded[key], value) for key, value in layer.state_dict().items())


def test_a_field_that_a_saved_spec_lacks_takes_its_default() -> None:
    layer = LowRankLinear(8, 10, 4, residual=ResidualConfig(alpha=0.5))
    state = layer.state_dict()
    state["residual.spec"] = torch.tensor(list(b'{"alpha": 0.5}'), dtype=torch.uint8)
    LowRankLinear(8, 10, 4, residual=ResidualConfig(alpha=0.5)).load_state_dict(state)
    expected = fold_state_dict(layer.state_dict())
    assert all(torch.equal(value, expected[key]) for key, value in fold_state_dict(state).items())


def test_a_field_of_a_later_version_is_refused() -> None:
    state = LowRankLinear(8, 10, 4, residual=ResidualConfig()).state_dict()
    state["residual.spec"] = torch.tensor(list(b'{"alpha": 0.5, "colour": "red"}'), dtype=torch.uint8)
    with pytest.raises(ValueError, match="damaged: it lacks 'colour', or a later version of foldrank wrote it"):
        fold_state_dict(state)
