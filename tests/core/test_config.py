import dataclasses
import json
import re
from typing import Any

import pytest

from foldrank.core.config import SCOPES, LowRankConfig, ResidualConfig, lookup, matches


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layers.0.mlp.up_proj", "layers.0.mlp.up_proj", True),
        ("up_proj", "layers.0.mlp.up_proj", True),
        ("mlp.up_proj", "layers.0.mlp.up_proj", True),
        ("p_proj", "layers.0.mlp.up_proj", False),
        ("0.q_proj", "layers.10.q_proj", False),
        ("mlp", "layers.0.mlp.up_proj", False),
        (r".*\.mlp\..*", "layers.0.mlp.up_proj", True),
        (r"layers\.\d", "layers.0.mlp.up_proj", False),
        (r"layers\.[01]\..*", "layers.2.q_proj", False),
    ],
)
def test_pattern_is_name_or_tail_or_full_regular_expression(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


@pytest.mark.parametrize(
    ("scope", "inside", "outside"),
    [
        ("attention", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"),
        ("attention", "encoder.layer.0.attention.self.query", "encoder.layer.0.output.dense"),
        ("mlp", "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"),
        ("mlp", "blocks.0.feed_forward.w1", "mlp"),
        ("all", "anything", "\n"),
    ],
)
def test_named_scopes(scope: str, inside: str, outside: str) -> None:
    assert re.fullmatch(SCOPES[scope], inside)
    assert not re.fullmatch(SCOPES[scope], outside)


def test_table_gives_exact_names_first_then_the_first_match() -> None:
    table = {r".*": 1, "q_proj": 2, "a.q_proj": 3}
    assert [lookup(table, name) for name in ("a.q_proj", "b.q_proj")] == [3, 1]
    assert lookup({"q_proj": 2}, "a.k_proj") is None
    assert lookup(5, "a.k_proj") == 5


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": -3}, "rank must be at least 1, got -3"),
        ({"rank": 1.0}, "rank as a fraction must lie between 0 and 1, got 1.0"),
        ({"rank": 0.0}, "rank as a fraction"),
        ({"rank": True}, "rank must be a number, got True"),
        ({"rank": float("nan")}, "rank must be a number, got nan"),
        ({"rank": "8"}, "rank must be a number, got '8'"),
        ({"rank": {}}, "rank is an empty table"),
        ({"rank": {"q_proj": 0}}, "rank of 'q_proj' must be at least 1"),
        ({"rank": {"(": 4}}, re.escape("rank: '(' is no name and no regular expression")),
        ({}, "rank is missing: give a rank, or a budget"),
        ({"rank": 4, "budget": 0.5}, "rank 4 and budget 0.5 exclude each other"),
        ({"budget": 50}, "budget must be a share of the parameters between 0 and 1, got 50"),
        ({"budget": 0.0}, "budget must be a share"),
        ({"budget": "half"}, "budget must be a share of the parameters between 0 and 1, got 'half'"),
        ({"rank": 4, "dense_first": -1}, "dense_first must be a number of blocks, 0 or more, got -1"),
        ({"rank": 4, "dense_last": 1.5}, "dense_last must be a number of blocks, 0 or more, got 1.5"),
        ({"rank": 4, "activation": "swish"}, "activation must be None or one of silu, .*, got 'swish'"),
        ({"rank": 4, "targets": "q_proj"}, "targets must be a list of patterns, got 'q_proj'"),
        ({"rank": 4, "targets": []}, "targets is empty"),
        ({"rank": 4, "targets": ["["]}, re.escape("targets: '['")),
        ({"rank": 4, "exclude": [5]}, "exclude: 5 is no name"),
    ],
)
def test_low_rank_config_refuses(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^LowRankConfig: .*{complaint}"):
        LowRankConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"alpha": float("inf")}, "alpha must be a finite number, got inf"),
        ({"alpha": "1"}, "alpha must be a finite number, got '1'"),
        ({"alpha": {"q_proj": None}}, "alpha must be a finite number, got None"),
        ({"alpha": {"*": 1.0}}, re.escape("alpha: '*' is no name")),
        ({"expansion": "tiled"}, "expansion must be one of contiguous, random, balanced, got 'tiled'"),
        (
            {"scope": "attn"},
            "scope must be one of all, attention, mlp, reading, writing or a list of patterns, got 'attn'",
        ),
        ({"scope": ["q_proj", "("]}, re.escape("scope: '('")),
        ({"scope": 3}, "scope must be a list of patterns, got 3"),
    ],
)
def test_residual_config_refuses(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^ResidualConfig: .*{complaint}"):
        ResidualConfig(**fields)


def test_all_problems_are_reported_at_once() -> None:
    fields: dict[str, Any] = {"rank": 0, "activation": "swish", "targets": [], "exclude": ["("]}
    with pytest.raises(ValueError, match=r"rank .*; activation .*; exclude: .*; targets "):
        LowRankConfig(**fields)


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LowRankConfig(rank=4).rank = 5  # pyright: ignore[reportAttributeAccessIssue]


CONFIGS = [
    LowRankConfig(rank=4),
    LowRankConfig(rank=0.25, activation="silu", targets=("q_proj", r".*\.mlp\..*"), exclude=("lm_head",)),
    LowRankConfig(rank={"q_proj": 4, r".*": 0.5}, residual=ResidualConfig()),
    LowRankConfig(budget=0.5, dense_first=1, dense_last=2),
    LowRankConfig(
        rank=4,
        residual=ResidualConfig(
            alpha={"q_proj": 0.7, "mlp.up_proj": 2},
            trainable=True,
            variance_correction=False,
            expansion="random",
            scope=("q_proj", "up_proj"),
            seed=7,
        ),
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_config_survives_json(config: LowRankConfig) -> None:
    assert LowRankConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert LowRankConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({}, "rank is missing"),
        ({"rank": 4, "ranks": 5, "foo": 1}, "LowRankConfig: unknown field foo, ranks; the fields are rank, "),
        ({"rank": 4, "residual": {"beta": 1.0}}, "ResidualConfig: unknown field beta; the fields are alpha, "),
        ({"rank": 4, "residual": {"alpha": "x"}}, "ResidualConfig: alpha must be a finite number"),
    ],
)
def test_from_dict_refuses(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        LowRankConfig.from_dict(fields)


def test_residual_for_layer() -> None:
    config = ResidualConfig(alpha={"q_proj": 0.5, "up_proj": 2.0}, scope="mlp", expansion="balanced", seed=3)
    expected = ResidualConfig(alpha=2.0, expansion="balanced", seed=3)
    assert config.for_layer("layers.0.mlp.up_proj") == expected
    assert config.for_layer("layers.0.mlp.down_proj") is None
    assert config.for_layer("layers.0.self_attn.q_proj") is None
    assert ResidualConfig(scope=["q_proj"]).for_layer("layers.0.self_attn.q_proj") == ResidualConfig()
