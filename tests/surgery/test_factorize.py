import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from foldrank import LowRankConfig, LowRankLinear, ResidualConfig, factorize_, fold_
from foldrank.core.config import Activation
from foldrank.core.inventory import count_parameters, inventory, low_rank_layers
from foldrank.surgery import backbones
from foldrank.surgery.factorize import describe

from ..core.models import MLP, TOKENS, TinyLM, assert_unchanged, residual_of, snapshot

PROJECTIONS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
INNER = [f"layers.{i}.{name}" for i in (0, 1) for name in PROJECTIONS]


class WithHead(TinyLM):
    def __init__(self, head: str) -> None:
        super().__init__()
        del self.lm_head
        self.head_name = head
        self.add_module(head, nn.Linear(8, 13))

    def get_output_embeddings(self) -> nn.Module:
        return self.get_submodule(self.head_name)


def ranks(model: nn.Module) -> dict[str, int]:
    return {name: layer.rank for name, layer in low_rank_layers(model).items()}


def alphas(model: nn.Module) -> dict[str, Any]:
    layers = low_rank_layers(model).items()
    return {name: residual_of(layer).config.alpha for name, layer in layers if layer.residual is not None}


def test_every_linear_layer_but_the_head_is_converted() -> None:
    model = TinyLM()
    before = count_parameters(model)
    report = factorize_(model, LowRankConfig(rank=3, activation="silu", residual=ResidualConfig()))
    assert list(ranks(model)) == [layer.name for layer in report.converted] == INNER
    assert dict(report.skipped) == {"lm_head": "output head (after the last block of layers)"}
    assert (report.params_before, report.params_after) == (before, count_parameters(model))
    assert report.params_after == before + sum(layer.params_after - layer.params_before for layer in report.converted)
    assert all(isinstance(layer.activation, nn.SiLU) for layer in low_rank_layers(model).values())
    assert model(TOKENS).shape == (3, 8, 13)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rank": 3, "targets": ["q_proj"]}, {"q_proj": 3}),
        ({"rank": 3, "targets": ["mlp.up_proj", r".*\.[qk]_proj"]}, {"q_proj": 3, "k_proj": 3, "up_proj": 3}),
        ({"rank": 3, "exclude": [r".*self_attn.*", "down_proj"]}, {"up_proj": 3}),
        ({"rank": 3, "targets": ["q_proj", "lm_head"]}, {"q_proj": 3, "lm_head": 3}),
        ({"rank": 0.5, "targets": ["q_proj", "up_proj"]}, {"q_proj": 4, "up_proj": 4}),
        ({"rank": 0.3, "targets": ["q_proj"]}, {"q_proj": 2}),
        ({"rank": 0.01, "targets": ["q_proj"]}, {"q_proj": 1}),
        ({"rank": 8, "targets": ["q_proj"]}, {"q_proj": 8}),
        ({"rank": {"q_proj": 2, "mlp.up_proj": 0.25}}, {"q_proj": 2, "up_proj": 2}),
        ({"rank": {"q_proj": 2, r".*": 5}, "targets": ["q_proj", "k_proj"]}, {"q_proj": 2, "k_proj": 5}),
        ({"rank": {"q_proj": 2, "k_proj": 5}, "exclude": [r"layers\.1\..*k_proj"]}, {"q_proj": 2, "0.k_proj": 5}),
    ],
)
def test_ranks_and_targets(fields: dict[str, Any], expected: dict[str, int]) -> None:
    model = TinyLM()
    factorize_(model, LowRankConfig(**fields))
    assert ranks(model) == {
        name: rank
        for name in [*INNER, "lm_head"]
        for tail, rank in expected.items()
        if name.replace("self_attn.", "").endswith(tail)
    }


@pytest.mark.parametrize(
    ("residual", "expected"),
    [
        (ResidualConfig(alpha=0.7), dict.fromkeys(PROJECTIONS, 0.7)),
        (ResidualConfig(scope="attention"), dict.fromkeys(PROJECTIONS[:3], 1.0)),
        (ResidualConfig(scope="mlp"), dict.fromkeys(PROJECTIONS[3:], 1.0)),
        (ResidualConfig(scope=["q_proj", r".*down.*"]), dict.fromkeys(["self_attn.q_proj", "mlp.down_proj"], 1.0)),
        (
            ResidualConfig(alpha={"q_proj": 2, r".*mlp.*": 0.5}),
            {"self_attn.q_proj": 2, "mlp.up_proj": 0.5, "mlp.down_proj": 0.5},
        ),
        (ResidualConfig(alpha={r".*_proj": 2.0}, scope="mlp"), dict.fromkeys(PROJECTIONS[3:], 2.0)),
    ],
)
def test_residual_scopes(residual: ResidualConfig, expected: dict[str, float]) -> None:
    model = TinyLM()
    report = factorize_(model, LowRankConfig(rank=3, residual=residual))
    wanted = {f"layers.{i}.{name}": alpha for i in (0, 1) for name, alpha in expected.items()}
    assert alphas(model) == wanted
    assert {layer.name for layer in report.converted if layer.residual} == set(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("training", [False, True])
def test_device_dtype_bias_and_mode_are_kept(training: bool, device: str, dtype: torch.dtype) -> None:
    model = TinyLM().to(device=device, dtype=dtype).train(training)
    biases = {name: linear.bias is not None for name, linear in model.named_modules() if isinstance(linear, nn.Linear)}
    residual = ResidualConfig(trainable=True, expansion="random")
    factorize_(model, LowRankConfig(rank=3, activation="silu", residual=residual))
    layers = low_rank_layers(model)
    assert {name: layer.up.bias is not None for name, layer in layers.items()} == {name: biases[name] for name in INNER}
    assert all(module.training is training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {tensor.device.type for tensor in model.state_dict().values()} == {device}


def test_layers_that_are_not_converted_keep_their_values_whatever_the_method() -> None:
    def model(low_rank: LowRankConfig | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = TinyLM()
        if low_rank is not None:
            factorize_(model, low_rank)
        return model.state_dict()

    dense = model(None)
    kept = {key for key in dense if "_proj" not in key}
    low_rank = [
        model(LowRankConfig(rank=3, activation=activation, residual=residual))
        for activation in (None, "silu")
        for residual in (None, ResidualConfig(expansion="random"), ResidualConfig(alpha=0.7, scope="mlp"))
    ]
    assert {"embed.weight", "norm.weight", "layers.0.norm.bias", "lm_head.weight"} <= kept
    for state in low_rank:
        assert all(torch.equal(state[key], dense[key]) for key in kept)
        factors = {key for key in state if key.endswith((".down.weight", ".up.weight", ".up.bias"))}
        assert len(factors) == 26
        assert all(torch.equal(state[key], low_rank[0][key]) for key in factors)


def test_random_expansions_differ_from_layer_to_layer_and_repeat() -> None:
    def indices(seed: int) -> list[tuple[int, ...]]:
        model = TinyLM(width=32, hidden=32)
        factorize_(model, LowRankConfig(rank=3, residual=ResidualConfig(expansion="random", seed=seed)))
        return [tuple(residual_of(layer).latent_index().tolist()) for layer in low_rank_layers(model).values()]

    assert len(set(indices(0) + indices(1))) == 20
    assert indices(0) == indices(0)


def test_a_shared_module_is_converted_once_at_all_its_homes() -> None:
    model = nn.Module()
    model.first = model.second = shared = nn.Linear(8, 8)
    model.stack = stack = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared), shared)
    report = factorize_(model, LowRankConfig(rank=2))
    assert [layer.name for layer in report.converted] == ["first"]
    homes = [model.first, model.second, *(stack.get_submodule(name) for name in ("0", "2.0", "3"))]
    assert all(home is homes[0] for home in homes)
    assert isinstance(homes[0], LowRankLinear)
    assert not any(module is shared for module in model.modules())


def test_layers_with_a_tied_weight_are_skipped() -> None:
    model = TinyLM()
    model.lm_head.weight = model.embed.weight
    model.layers[1].mlp.up_proj.weight = model.layers[0].mlp.up_proj.weight  # pyright: ignore
    report = factorize_(model, LowRankConfig(rank=3, targets=["up_proj", "lm_head", "q_proj"]))
    assert [layer.name for layer in report.converted] == ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]
    reasons = {name: reason for name, reason in report.skipped.items() if reason != "not a target"}
    assert reasons == {
        "layers.0.mlp.up_proj": "its weight is shared with layers.1.mlp.up_proj",
        "layers.1.mlp.up_proj": "its weight is shared with layers.0.mlp.up_proj",
        "lm_head": "its weight is shared with embed",
    }
    assert model.lm_head.weight is model.embed.weight


def deep(blocks: int) -> nn.Module:
    """Blocks that are mixtures of more experts than there are blocks, before a list of heads."""
    model = TinyLM()
    model.layers = nn.ModuleList(
        nn.ModuleDict({"proj": nn.Linear(8, 8), "experts": nn.ModuleList(MLP(8, 8) for _ in range(blocks + 2))})
        for _ in range(blocks)
    )
    model.heads = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(blocks + 3))
    return model


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 0), (0, 1), (2, 1), (1, 3)])
def test_first_and_last_blocks_stay_dense(first: int, last: int) -> None:
    model = deep(5)
    report = factorize_(
        model, LowRankConfig(rank=2, targets=["layers.*", "heads.*"], dense_first=first, dense_last=last)
    )
    converted = {name.split(".")[1] for name in ranks(model) if name.startswith("layers.")}
    assert converted == {str(block) for block in range(first, 5 - last)}
    assert sum(name.startswith("heads.") for name in ranks(model)) == 8
    reasons = {name.split(".")[1]: reason for name, reason in report.skipped.items() if name.startswith("layers.")}
    assert reasons == {
        **{str(block): "in a block of layers that stays dense (dense_first)" for block in range(first)},
        **{str(block): "in a block of layers that stays dense (dense_last)" for block in range(5 - last, 5)},
    }


def test_blocks_are_those_that_hold_targets() -> None:
    model = TinyLM()
    model.layers.insert(0, nn.Identity())
    factorize_(model, LowRankConfig(rank=2, targets=["q_proj"], dense_first=1))
    assert list(ranks(model)) == ["layers.2.self_attn.q_proj"]


@pytest.mark.parametrize(
    "build",
    [
        lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
        lambda: prune.identity(nn.Linear(8, 8), "weight"),
    ],
)
def test_layers_with_a_computed_weight_are_skipped(build: Any) -> None:
    model = nn.Sequential(build(), nn.Linear(8, 8))
    report = factorize_(model, LowRankConfig(rank=2))
    assert dict(report.skipped) == {"0": "its weight is computed from others (parametrized, normalised or pruned)"}


def test_subclasses_of_linear_are_skipped() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    report = factorize_(model, LowRankConfig(rank=2))
    assert list(ranks(model)) == ["1"]
    assert report.skipped["0.out_proj"].startswith("a NonDynamicallyQuantizableLinear")


def test_the_output_head_is_asked_for_by_the_interface_of_transformers() -> None:
    model = WithHead("to_logits")
    assert dict(factorize_(model, LowRankConfig(rank=3)).skipped) == {
        "to_logits": "output head (get_output_embeddings gives it)"
    }


REFUSED = [
    (
        LowRankConfig(rank=3, targets=["q_prj"]),
        r"targets: 'q_prj' matches no linear layer here; the nearest names are .*q_proj",
    ),
    (LowRankConfig(rank=3, targets=["q_proj", "norm"]), "targets: 'norm' matches no linear layer"),
    (LowRankConfig(rank=3, exclude=["head"]), "exclude: 'head' matches no linear layer here; .*lm_head"),
    (LowRankConfig(rank={"q_proj": 3, "upproj": 2}), "'upproj' matches no linear layer here; .*up_proj"),
    (LowRankConfig(rank={"q_proj": 3, "up_proj": 2}, exclude=["up_proj"]), "rank: 'up_proj' matches no linear layer"),
    (LowRankConfig(rank={"q_proj": 3}, targets=["q_proj", "k_proj"]), r"no entry for layers\.0\.self_attn\.k_proj"),
    (LowRankConfig(rank=3, targets=["q_proj"], exclude=["q_proj"]), "nothing to convert: .*q_proj: excluded"),
    (LowRankConfig(rank=3, residual=ResidualConfig(scope=["v_proj"])), "residual.scope: 'v_proj' matches no .*_proj"),
    (LowRankConfig(rank=3, targets=["q_proj"], residual=ResidualConfig(scope="mlp")), "residual.scope: .*mlp"),
    (LowRankConfig(rank=3, residual=ResidualConfig(alpha={"lm_head": 1.0})), "residual.alpha: 'lm_head' matches no"),
    (
        LowRankConfig(rank=3, residual=ResidualConfig(alpha={"q_proj": 1.0}, scope="mlp")),
        "scope and alpha together name no",
    ),
    (
        LowRankConfig(rank=2, dense_first=1, dense_last=1),
        "dense_first 1 and dense_last 1 leave none of the 2 blocks",
    ),
    (LowRankConfig(rank=2, targets=["lm_head"], dense_last=1), "no nn.ModuleList here holds targets, as blocks would"),
    (
        LowRankConfig(rank=9, targets=["q_proj"]),
        r"rank 9 is above the full rank 8 of layers\.0\.self_attn\.q_proj \(8 -> 8\)",
    ),
    (
        LowRankConfig(rank={"q_proj": 3, r".*down_proj": 9}),
        r"full rank 8 of .*down_proj \(10 -> 8\): give a smaller rank",
    ),
]


@pytest.mark.parametrize(("config", "complaint"), REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(config: LowRankConfig, complaint: str) -> None:
    model = TinyLM()
    before, generator = snapshot(model), torch.random.get_rng_state()
    with pytest.raises(ValueError, match=complaint):
        factorize_(model, config)
    assert_unchanged(model, before)
    assert torch.equal(torch.random.get_rng_state(), generator)


@pytest.mark.parametrize("folded", [False, True])
def test_a_low_rank_model_is_refused(folded: bool) -> None:
    model = TinyLM()
    config = LowRankConfig(rank=3, targets=["q_proj"], residual=ResidualConfig())
    factorize_(model, config)
    if folded:
        fold_(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"already low-rank: layers\.0\.self_attn\.q_proj, layers\.1"):
        factorize_(model, LowRankConfig(rank=3, targets=["k_proj"]))
    assert_unchanged(model, before)


def test_a_linear_layer_as_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"itself a linear layer .*: build a LowRankLinear"):
        factorize_(nn.Linear(8, 8), LowRankConfig(rank=2))


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(Sequential\) has no nn.Linear"):
        factorize_(nn.Sequential(nn.Conv1d(8, 8, 1)), LowRankConfig(rank=2))


def test_report_prints_a_table_and_logs_a_line(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(100, 50))
    model.add_module("lm_head", nn.Linear(50, 10))
    with caplog.at_level("INFO", logger="foldrank"):
        report = factorize_(model, LowRankConfig(rank=4, residual=ResidualConfig()))
    summary = "converted 1 of 2 linear layers, skipped lm_head; 5,560 -> 1,160 parameters"
    assert caplog.messages == [summary]
    assert str(report).splitlines() == [
        "layer    shape      rank  residual  parameters",
        "fc       100 -> 50  4     yes       5,050 -> 650",
        "lm_head  dense                      output head (the last linear layer)",
        summary,
    ]


def test_summary_names_three_of_many_skipped() -> None:
    report = factorize_(TinyLM(), LowRankConfig(rank=3, targets=["layers.0.mlp.up_proj"]))
    assert report.summary().startswith(
        "converted 1 of 11 linear layers, skipped layers.0.mlp.down_proj, layers.0.self_attn.k_proj, "
        "layers.0.self_attn.o_proj and 7 more; "
    )


def test_the_inventory_meets_each_module_once_and_stays_out_of_low_rank_layers() -> None:
    model = TinyLM()
    factorize_(model, LowRankConfig(rank=3, residual=ResidualConfig()))
    model.again = model.layers[0]
    contents = inventory(model)
    names = list(contents.modules)
    assert len(names) == len(set(names)) == 1 + 2 + 2 * 4 + 10 + 2
    assert not any(part in name for name in names for part in (".down.", ".up.", "residual", "again"))
    parents = {
        name: [(type(parent).__name__, attribute) for parent, attribute in parents]
        for name, parents in contents.parents.items()
    }
    assert parents[""] == []
    assert parents["layers.0"] == [("TinyLM", "again"), ("ModuleList", "0")]


DESCRIBED = [
    LowRankConfig(rank=3),
    LowRankConfig(rank=0.5, activation="silu", residual=ResidualConfig(alpha=0.7, trainable=True)),
    LowRankConfig(rank={"q_proj": 2, "up_proj": 5}, residual=ResidualConfig(scope="mlp", expansion="balanced")),
    LowRankConfig(rank=3, residual=ResidualConfig(alpha={"q_proj": 2, r".*mlp.*": 0.5}, variance_correction=False)),
    LowRankConfig(rank=3, exclude=["k_proj"], residual=ResidualConfig(expansion="random", seed=4)),
    LowRankConfig(rank=3, targets=["lm_head", "q_proj"]),
]


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("config", DESCRIBED)
def test_a_described_model_can_be_rebuilt(config: LowRankConfig, fold: bool) -> None:
    model = TinyLM()
    factorize_(model, config)
    if fold:
        fold_(model)
    described = describe(model)
    assert described is not None
    rebuilt = TinyLM()
    factorize_(rebuilt, LowRankConfig.from_dict(json.loads(json.dumps(described.to_dict()))))
    assert repr(rebuilt) == repr(model)
    assert describe(rebuilt) == described
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(TOKENS), model(TOKENS))


def test_a_described_model_can_be_rebuilt_where_names_are_tails_of_others() -> None:
    def model() -> nn.Module:
        inner = nn.ModuleDict({"proj": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
        middle = nn.ModuleDict({"a": inner, "proj": nn.Linear(8, 8)})
        return nn.ModuleDict(
            {"proj": nn.Linear(8, 8), "a": middle, "b": nn.ModuleDict({"a": nn.ModuleDict({"proj": nn.Linear(8, 8)})})}
        )

    source = model()
    factorize_(source, LowRankConfig(rank={"^proj$": 2, r"^b\.a\.proj$": 3}, residual=ResidualConfig(scope=["^proj$"])))
    assert ranks(source) == {"proj": 2, "b.a.proj": 3}
    described = describe(source)
    assert described is not None
    rebuilt = model()
    factorize_(rebuilt, described)
    assert ranks(rebuilt) == ranks(source)
    assert alphas(rebuilt) == alphas(source) == {"proj": 1.0}


def test_a_dense_model_has_no_description() -> None:
    assert describe(TinyLM()) is None


@pytest.mark.parametrize(
    ("activation", "residual"),
    [("silu", ResidualConfig()), (None, ResidualConfig(trainable=True)), (None, ResidualConfig(expansion="balanced"))],
)
def test_what_one_config_cannot_say_is_refused(activation: Activation | None, residual: ResidualConfig) -> None:
    first = LowRankLinear(8, 8, 2, residual=ResidualConfig())
    second = LowRankLinear(8, 8, 2, activation=activation, residual=residual)
    with pytest.raises(ValueError, match="differ in backbone, activation, scale or expansion"):
        describe(nn.Sequential(first, second))


def test_layers_built_by_hand_are_described() -> None:
    layers = [LowRankLinear(8, 8, 2, residual=ResidualConfig(scope=["fc"], alpha=alpha)) for alpha in (1.0, 2.0)]
    expected = LowRankConfig(rank={"0": 2, "1": 2}, residual=ResidualConfig(alpha={"0": 1.0, "1": 2.0}))
    assert describe(nn.Sequential(*layers)) == expected


def test_a_weight_shared_with_the_model_itself_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.register_parameter("again", model.get_parameter("1.weight"))
    assert factorize_(model, LowRankConfig(rank=2)).skipped["1"] == "its weight is shared with Sequential"


class Blocks(nn.Module):
    """Embedding, blocks and what comes behind them, as the models of torchtitan, OLMo and GPT-NeoX have them."""

    def __init__(self, blocks: nn.Module, **behind: nn.Module) -> None:
        super().__init__()
        self.tok_embeddings = nn.Linear(3, 8)
        self.layers = blocks
        for name, module in behind.items():
            self.add_module(name, module)


def block_of(number: int = 2) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(number)]


@pytest.mark.parametrize("name", ["lm_head", "output", "final_linear", "to_logits", "unembed", "decoder", "score"])
@pytest.mark.parametrize(
    "blocks",
    [
        lambda: nn.ModuleList(block_of()),
        lambda: nn.ModuleDict({str(number): block for number, block in enumerate(block_of())}),
    ],
    ids=["ModuleList", "ModuleDict"],
)
def test_the_head_is_what_comes_after_the_last_block_whatever_its_name(blocks: Any, name: str) -> None:
    model = Blocks(blocks(), norm=nn.LayerNorm(8), **{name: nn.Linear(8, 13)})
    report = factorize_(model, LowRankConfig(rank=2))
    assert dict(report.skipped) == {name: "output head (after the last block of layers)"}
    nested = Blocks(nn.ModuleList(block_of()), head=nn.ModuleDict({"w_out": nn.Linear(8, 13)}))
    assert list(factorize_(nested, LowRankConfig(rank=2)).skipped) == ["head.w_out"]


def test_without_blocks_the_head_is_the_last_linear_layer_and_one_layer_has_none() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))
    assert dict(factorize_(model, LowRankConfig(rank=2)).skipped) == {"2": "output head (the last linear layer)"}
    alone = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    assert not factorize_(alone, LowRankConfig(rank=2)).skipped
    named = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))
    assert not factorize_(named, LowRankConfig(rank={"0": 2, "2": 3})).skipped


def test_two_towers_have_the_heads_behind_the_second() -> None:
    model = nn.Module()
    model.text, model.image = (nn.ModuleDict({"layers": nn.ModuleList(block_of())}) for _ in range(2))
    model.projection = nn.Linear(8, 5)
    assert list(factorize_(model, LowRankConfig(rank=2)).skipped) == ["projection"]


def test_a_bare_model_without_a_head_has_none() -> None:
    assert not factorize_(Blocks(nn.ModuleList(block_of())), LowRankConfig(rank=2)).skipped


def test_a_getter_that_has_nothing_to_give_is_asked_in_vain() -> None:
    class Refuses(Blocks):
        def get_output_embeddings(self) -> nn.Module:
            raise NotImplementedError

    model = Refuses(nn.ModuleList(block_of()), unembed=nn.Linear(8, 13))
    assert list(factorize_(model, LowRankConfig(rank=2)).skipped) == ["unembed"]


def test_what_a_replacement_would_drop_stays_dense_and_is_reported() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    model[0].register_forward_hook(lambda *_: None)
    model[1].requires_grad_(False)
    model[2].forward = lambda input: input  # noqa: A006
    report = factorize_(model, LowRankConfig(rank=2))
    assert [layer.name for layer in report.converted] == ["3"]
    assert report.skipped["0"] == "it has hooks, which the replacement would drop"
    assert report.skipped["1"].startswith("its weight is frozen (requires_grad is False)")
    assert report.skipped["2"].startswith("its forward is replaced")


def test_out_of_memory_half_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    class Greedy(LowRankLinear):
        def __init__(self, *args: Any, name: str = "", **kwargs: Any) -> None:
            super().__init__(*args, name=name, **kwargs)
            built.append(name)
            if len(built) == 3:
                raise MemoryError

    monkeypatch.setitem(backbones.BACKBONES, "greedy", Greedy)
    model = TinyLM()
    before = snapshot(model)
    with pytest.raises(MemoryError):
        factorize_(model, LowRankConfig(rank=3, backbone="greedy"))
    assert len(built) == 3
    assert_unchanged(model, before)


def test_names_that_are_tails_of_others_are_rebuilt_by_name() -> None:
    def towers() -> nn.Module:
        model = nn.ModuleDict({"layers": nn.ModuleList(block_of()), "tower": nn.ModuleDict()})
        model["tower"].add_module("layers", nn.ModuleList(block_of()))
        return model

    model = towers()
    config = LowRankConfig(
        rank={r"^layers\.0\.0$": 2, r"^tower\.layers\.0\.1$": 3},
        residual=ResidualConfig(alpha={r"^layers\.0\.0$": 0.5}),
    )
    factorize_(model, config)
    described = describe(model)
    assert described is not None
    twin = towers()
    factorize_(twin, LowRankConfig.from_dict(json.loads(json.dumps(described.to_dict()))))
    twin.load_state_dict(model.state_dict())
    assert ranks(twin) == ranks(model) == {"layers.0.0": 2, "tower.layers.0.1": 3}
    assert alphas(twin) == alphas(model) == {"layers.0.0": 0.5}
