"""CR-Net's backbone against a literal loop over blocks, and all that a model on it goes through."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from foldrank import LowRankConfig, ResidualConfig, factorize_, fold_
from foldrank.core.inventory import low_rank_layers
from foldrank.hf import convert_
from foldrank.hf.checkpoint import fold_checkpoint
from foldrank.hf.crnet import CrossLayerLinear
from foldrank.hf.families import LowRankLlamaForCausalLM
from foldrank.recipes import RECIPES, load_recipe
from foldrank.train.activation_checkpointing import checkpoint_activations_
from foldrank.train.compilation import compile_
from foldrank.train.pretrain import pretrain

from ..small_runs import SMALL_MODEL
from .models import SHAPE, TOKENS, config, logits, trained

DEEP: dict[str, Any] = {"num_hidden_layers": 4}
PLAIN = LowRankConfig(rank=3, backbone="crnet", dense_first=1)
CRNET = {
    "plain": PLAIN,
    "dlr": replace(PLAIN, residual=ResidualConfig(alpha=0.9)),
    "dlr, signed, scaled": replace(
        PLAIN, scale="trainable", residual=ResidualConfig(trainable=True, signs="alternating", scope="reading")
    ),
    "with an activation": replace(PLAIN, activation="silu", residual=ResidualConfig()),
    "MLP alone": replace(PLAIN, targets=["gate_proj", "up_proj", "down_proj"], residual=ResidualConfig()),
    "the last block dense": replace(PLAIN, dense_last=1),
}
EACH = pytest.mark.parametrize("low_rank", CRNET.values(), ids=CRNET)
BIASES = pytest.mark.parametrize("others", [{}, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}])


@pytest.fixture
def norms_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' norm casts to float32, which hides all smaller differences."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def literal(model: Any, tokens: Tensor) -> Tensor:
    """Logits by the equation of CR-Net's paper, block by block, of a model that nothing is asked but its weights."""

    def product(layer: nn.Module, x: Tensor, before: Tensor | None) -> Tensor:
        if not isinstance(layer, CrossLayerLinear):
            return nn.functional.linear(x, layer.weight, layer.bias)  # pyright: ignore[reportArgumentType]
        assert before is not None
        z = x @ layer.down.weight.T
        z = z if layer.activation_name is None else nn.functional.silu(z)
        y = nn.functional.linear(z, layer.effective_weight(layer.up.weight), layer.up.bias)
        b = layer.shortcut
        return y + torch.where(b > 0, b + 1e-6, b - 1e-6) * before

    x = model.model.embed_tokens(tokens)
    rotary = model.model.rotary_emb(x, torch.arange(tokens.shape[1])[None])
    before: dict[str, Tensor] = {}
    for block in model.model.layers:
        given: dict[str, Tensor] = {}

        def through(name: str, x: Tensor, block: Any = block, given: Any = given, before: Any = before) -> Tensor:
            home = block.self_attn if name in "qkvo" else block.mlp
            given[name] = product(getattr(home, f"{name}_proj"), x, before.get(name))
            return given[name]

        normalized, heads = block.input_layernorm(x), model.config.num_attention_heads
        q, k, v = (
            through(name, normalized).unflatten(-1, (-1, model.config.head_dim)).transpose(1, 2) for name in "qkv"
        )
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        k, v = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (k, v))
        scores = q @ k.mT / model.config.head_dim**0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        attended = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        x = x + through("o", attended.transpose(1, 2).flatten(-2))
        normalized = block.post_attention_layernorm(x)
        x = x + through("down", nn.functional.silu(through("gate", normalized)) * through("up", normalized))
        before = given
    return model.lm_head(model.model.norm(x))


def with_other_gains(model: Any) -> Any:
    """Gains of either sign, different everywhere."""
    with torch.no_grad():
        for number, layer in enumerate(low_rank_layers(model).values()):
            layer.shortcut.fill_((-1) ** number * (0.3 + 0.05 * number))  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    return model


@EACH
@BIASES
@pytest.mark.usefixtures("norms_in_float64")
def test_outputs_and_gradients_are_those_of_the_equation(low_rank: LowRankConfig, others: dict[str, Any]) -> None:
    model = with_other_gains(trained(low_rank, torch.float64, **DEEP, **others))
    gradients = []
    outputs = [model(input_ids=TOKENS).logits, literal(model, TOKENS)]
    for output in outputs:
        model.zero_grad()
        output.square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    assert sum("shortcut" in name for name in gradients[0]) == len(low_rank_layers(model)) > 0
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-11)
        assert gradient.abs().sum() > 0


@EACH
def test_it_folds_loads_and_generates_without_the_residual(low_rank: LowRankConfig, tmp_path: Path) -> None:
    model = with_other_gains(trained(low_rank, **DEEP))
    model.save_pretrained(tmp_path / "unfolded")
    expected = logits(model)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "unfolded")), expected)
    if low_rank.residual is None:  # there is nothing to fold
        shutil.copytree(tmp_path / "unfolded", tmp_path / "folded")
    else:
        fold_checkpoint(tmp_path / "unfolded", tmp_path / "folded")
    folded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    torch.testing.assert_close(logits(folded), expected, rtol=1e-4, atol=1e-5)
    files = {path.name for path in (tmp_path / "folded").iterdir()}
    assert {"modeling_crnet_llama.py", "modeling_lowrank_llama.py"} <= files
    reference = json.loads((tmp_path / "folded" / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
    assert reference == "modeling_crnet_llama.LowRankLlamaForCausalLM"
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, uncached = (folded.generate(TOKENS[:1, :4], use_cache=cache, **how) for cache in (True, False))
    assert cached.tolist() == uncached.tolist()


def test_padding_and_hidden_states() -> None:
    model: Any = with_other_gains(trained(CRNET["dlr"], **DEEP))
    mask = torch.ones_like(TOKENS)
    mask[:, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(input_ids=TOKENS, attention_mask=mask, position_ids=positions).logits[:, 4:]
        alone = model(input_ids=TOKENS[:, 4:], output_hidden_states=True)
    torch.testing.assert_close(padded, alone.logits, rtol=1e-4, atol=1e-5)
    assert [tuple(states.shape) for states in alone.hidden_states] == 5 * [(3, 6, 16)]


@pytest.mark.parametrize("keeps", ["block", "latents"])
def test_blocks_that_are_computed_again_give_the_same_gradients(keeps: Any) -> None:
    plain: Any = trained(CRNET["dlr"], **DEEP).train()
    again: Any = copy.deepcopy(plain)
    checkpoint_activations_(again, keeps)
    for model in (plain, again):
        model.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("graphs_without_kernels")
def test_blocks_compile_one_by_one() -> None:
    torch.compiler.reset()
    plain: Any = trained(CRNET["dlr"], **DEEP).train()
    compiled: Any = copy.deepcopy(plain)
    assert compile_(compiled, "blocks") == tuple(f"model.layers.{number}" for number in range(4))
    for model in (plain, compiled):
        model.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_a_run_of_it_goes_on_to_the_last_bit(recipe_file: Path, tmp_path: Path) -> None:
    settings = {**SMALL_MODEL, "model.num_layers": 3, "low_rank.backbone": "crnet", "low_rank.dense_first": 1}
    short = {"train.steps": 4, "train.eval_every": 2, "train.save_every": 2}
    recipe = load_recipe(str(recipe_file), {**settings, **short, "low_rank.activation": None})
    whole = pretrain(recipe, tmp_path / "run")
    weights = load_file(tmp_path / "run" / "folded" / "model.safetensors")
    assert whole.fold_max_abs_logit_drift < 1e-5
    shutil.rmtree(tmp_path / "run" / "folded")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    (tmp_path / "run" / "metrics.json").unlink()
    again = pretrain(recipe, tmp_path / "run", resume=True)
    assert (again.resumed_at_step, again.val_loss) == (2, whole.val_loss)
    for name, tensor in load_file(tmp_path / "run" / "folded" / "model.safetensors").items():
        assert torch.equal(tensor, weights[name])


def test_a_dense_llama_is_converted_in_place() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(None, **DEEP))  # pyright: ignore[reportArgumentType]
    report = convert_(model, CRNET["dlr"])
    assert report is not None
    assert len(report.converted) == 3 * 7
    assert isinstance(model, LowRankLlamaForCausalLM)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=TOKENS).logits, literal(model, TOKENS), rtol=1e-4, atol=1e-5)
    fold_(model)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize(
    ("build", "change", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
            {"dense_first": 0},
            "is for Llama alone, and this is",
        ),
        (lambda: family("mistral"), {}, "is for Llama alone, and this is a MistralForCausalLM"),
        (lambda: family("llama"), {"dense_first": 0}, "the first block of crnet is dense, as it has none before it"),
        (lambda: family("llama"), {"targets": ["q_proj", "lm_head"]}, "lm_head is in none: exclude it"),
    ],
    ids=["any module", "Mistral", "first block", "head"],
)
def test_what_it_does_not_fit_is_refused_by_name(build: Any, change: dict[str, Any], message: str) -> None:
    model = build()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        factorize_(model, replace(PLAIN, **change))
    assert [type(module) for module in model.modules()] == before


def test_a_layer_alone_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="needs the output of the same layer in the block before"):
        CrossLayerLinear(8, 6, 2)(torch.zeros(3, 8))


def test_its_recipe_is_linear_and_takes_dlr() -> None:
    recipe = RECIPES["tiny-crnet-dlr"]
    assert recipe.low_rank is not None
    assert (recipe.low_rank.backbone, recipe.low_rank.activation) == ("crnet", None)
    assert recipe.low_rank.residual == ResidualConfig()


def family(model_type: str) -> nn.Module:
    from transformers import AutoConfig

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SHAPE))
