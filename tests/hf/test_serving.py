"""What servers and generation ask of a checkpoint: padding, caches, attention, devices, tensor parallelism, vLLM."""

import inspect
import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    TextStreamer,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from foldrank import LowRankConfig, ResidualConfig, fold_
from foldrank.core.inventory import low_rank_layers
from foldrank.hf import LowRankLlamaConfig, LowRankLlamaModel
from foldrank.hf.modeling_lowrank_llama import tensor_parallel_plan
from foldrank.hf.vllm_plugin import BACKEND, register

from .models import COLA_DLR, SHAPE, TOKENS, config, logits, trained

FORMS = ["folded", "unfolded"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model, unfolded and folded."""
    root = tmp_path_factory.mktemp("serving")
    model = trained(vocab_size=320, pad_token_id=0)
    model.save_pretrained(root / "unfolded")
    fold_(model)
    model.save_pretrained(root / "folded")
    return root


def load(folder: Path, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **how).eval()


GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("form", FORMS)
def test_a_padded_batch_gives_what_each_prompt_gives_alone(root: Path, form: str) -> None:
    model = load(root / form)
    prompts = [TOKENS[0, 1:4], TOKENS[1, :7], TOKENS[2]]  # none with the token of padding
    mask = torch.stack([torch.arange(10) >= 10 - len(prompt) for prompt in prompts]).long()
    batch = torch.stack([nn.functional.pad(prompt, (10 - len(prompt), 0)) for prompt in prompts])
    together = model.generate(batch, attention_mask=mask, **GREEDY)[:, 10:]
    alone = [model.generate(prompt[None], **GREEDY)[0, len(prompt) :] for prompt in prompts]
    assert together.tolist() == [tokens.tolist() for tokens in alone]
    with torch.no_grad():
        padded = model(input_ids=batch, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        for row, prompt in zip(padded, prompts, strict=True):
            torch.testing.assert_close(row[-len(prompt) :], model(input_ids=prompt[None]).logits[0], rtol=0, atol=3e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "how",
    [
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
        {"streamer": True},
        {"assistant_model": True},
    ],
    ids=lambda how: next(iter(how)),
)
def test_each_way_to_generate_comes_to_the_same_tokens(root: Path, form: str, how: dict[str, Any]) -> None:
    model, prompt = load(root / form), TOKENS[:1, :5]
    made = {"assistant_model": lambda: load(root / "folded"), "streamer": lambda: TextStreamer(words())}
    how = {name: made[name]() if name in made else value for name, value in how.items()}
    assert torch.equal(model.generate(prompt, **GREEDY, **how), model.generate(prompt, **GREEDY))


@pytest.mark.parametrize("form", FORMS)
def test_beams_are_at_least_as_likely_as_the_greedy_tokens(root: Path, form: str) -> None:
    model, prompt = load(root / form), TOKENS[:1, 1:5]

    def likelihood(**how: Any) -> float:
        tokens = model.generate(prompt, **GREEDY, **how)
        with torch.no_grad():
            return -model(input_ids=tokens, labels=tokens).loss.item()

    assert likelihood(num_beams=3) >= likelihood() - 1e-6


@pytest.mark.apart
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_it_is_exported_and_compiled_ahead_of_time(root: Path, tmp_path: Path) -> None:
    model = load(root / "folded")
    program = torch.export.export(model, (), {"input_ids": TOKENS, "use_cache": False}, strict=False)
    expected = logits(model)
    torch.testing.assert_close(program.module()(input_ids=TOKENS, use_cache=False).logits, expected)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compiled: Any = torch._inductor.aoti_load_package(package)
    torch.testing.assert_close(compiled(input_ids=TOKENS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_an_average_of_its_weights_is_a_model_that_folds(root: Path, form: str, tmp_path: Path) -> None:
    model = load(root / form)
    average: Any = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    average.update_parameters(model)
    assert bool(fold_(average.module).errors) == (form == "unfolded")
    average.module.save_pretrained(tmp_path)
    expected = 2 * logits(load(root / form))
    torch.testing.assert_close(logits(load(tmp_path)), expected, rtol=1e-4, atol=1e-5)


def words() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    vocabulary = {character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the flexible one imports and sets
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.apart)])
def test_each_attention_is_the_plain_one(root: Path, form: str, attention: str) -> None:
    plain, other = load(root / form, attn_implementation="eager"), load(root / form, attn_implementation=attention)
    torch.testing.assert_close(logits(other), logits(plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_is_the_cast_of_the_weights(root: Path, form: str, dtype: torch.dtype) -> None:
    model, narrow = load(root / form), load(root / form, dtype=dtype)
    for (name, value), (same, other) in zip(model.named_parameters(), narrow.named_parameters(), strict=True):
        assert name == same
        assert torch.equal(value.to(dtype), other)
    torch.testing.assert_close(logits(narrow).float(), logits(model), rtol=0, atol=0.02)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"model": "cpu", "lm_head": "disk"}], ids=str)
def test_a_device_map_changes_nothing(root: Path, form: str, device_map: Any, tmp_path: Path) -> None:
    placed = load(root / form, device_map=device_map, offload_folder=tmp_path)
    torch.testing.assert_close(logits(placed), logits(load(root / form)), rtol=0, atol=1e-6)


def test_layers_on_disk_change_nothing(root: Path, tmp_path: Path) -> None:
    parts = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    placed = load(root / "folded", device_map=device_map, offload_folder=tmp_path)
    assert torch.equal(logits(placed), logits(load(root / "folded")))


def test_a_pipeline_writes(root: Path, tmp_path: Path) -> None:
    model, tokenizer = load(root / "folded"), words()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write = pipeline("text-generation", model=str(tmp_path), trust_remote_code=True, device="cpu")
    (text,) = write("def ", max_new_tokens=4, do_sample=False)
    expected = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert text["generated_text"] == tokenizer.decode(expected[0], skip_special_tokens=True)


# --- vLLM's Transformers backend, what it asks of a model, without vLLM ---


def recorded(module: nn.Module, *args: Any, seen: dict[str, Tensor], **kwargs: Any) -> tuple[Tensor, None]:
    """An attention of somebody's own, which needs an argument that the model was called with."""
    seen[str(module.layer_idx)] = args[0].detach()
    output, _ = sdpa_attention_forward(module, *args, **kwargs)
    return output, None


class OtherLinear(nn.Module):
    """A server's linear layer, made of the sizes of the one that it replaces."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(linear.out_features, linear.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


@pytest.mark.parametrize("where", ["with foldrank", "from the checkpoint"])
def test_a_server_puts_its_own_layers_and_attention_into_the_model(root: Path, where: str) -> None:
    folder = root / "folded"
    classes: list[Any] = [LowRankLlamaConfig, LowRankLlamaModel]
    if where == "from the checkpoint":
        names = json.loads((folder / "config.json").read_text())["auto_map"]
        classes = [get_class_from_dynamic_module(names[name], folder) for name in ("AutoConfig", "AutoModel")]
    expected = logits(load(folder))
    AttentionInterface.register("recorded", recorded)
    config = classes[0].from_pretrained(folder)
    config._attn_implementation = "recorded"
    with torch.device("meta"):
        model: Any = classes[1](config)
    assert model.is_backend_compatible()
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert len(names) == 2 * len(low_rank_layers(load(folder))) > 0
    for name in names:
        model.set_submodule(name, OtherLinear(model.get_submodule(name)))
    model.to_empty(device="cpu")
    model.rotary_emb.__init__(config)  # its frequencies are no weights
    weights = load_file(folder / "model.safetensors")
    head = weights.pop("lm_head.weight")
    model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()}, strict=False)
    assert {f"model.{name}" for name, _ in model.named_parameters()} == weights.keys()
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        hidden = model(input_ids=TOKENS[:1], position_ids=torch.arange(10)[None], use_cache=False, seen=seen)
    assert sorted(seen) == ["0", "1"]
    torch.testing.assert_close(hidden.last_hidden_state @ head.T, expected[:1], rtol=0, atol=1e-5)


def test_vllm_finds_the_plugin() -> None:
    (plugin,) = [each for each in entry_points(group="vllm.general_plugins") if each.name == "foldrank"]
    assert plugin.load() is register
    assert BACKEND.endswith(":TransformersForCausalLM")
    assert not inspect.signature(register).parameters


# --- Tensor parallelism ---


def plan_of(low_rank: LowRankConfig | None, folder: Path) -> dict[str, str] | None:
    model = trained(low_rank)
    fold_(model)
    model.save_pretrained(folder)
    return load(folder).config.base_model_tp_plan


def test_the_rank_is_never_split(tmp_path: Path) -> None:
    plan = plan_of(COLA_DLR, tmp_path) or {}
    assert {name: plan[f"layers.*.{name}"] for name in ("self_attn.q_proj.up", "mlp.up_proj.up")} == {
        "self_attn.q_proj.up": "colwise",
        "mlp.up_proj.up": "colwise",
    }
    assert plan["layers.*.self_attn.o_proj.down"] == plan["layers.*.mlp.down_proj.down"] == "rowwise"
    assert len(plan) == 7


def test_a_dense_layer_keeps_its_own_plan(tmp_path: Path) -> None:
    plan = plan_of(LowRankConfig(rank=3, exclude=["o_proj"]), tmp_path) or {}
    assert plan["layers.*.self_attn.o_proj"] == "rowwise"
    assert plan["layers.*.self_attn.q_proj.up"] == "colwise"
    assert config(None).base_model_tp_plan == LlamaConfig.base_model_tp_plan


@pytest.mark.parametrize(
    "low_rank",
    [
        LowRankConfig(rank=3, exclude=["layers.0.self_attn.q_proj"]),
        LowRankConfig(rank=3, backbone="sltrain", extra_config={"density": 0.1}),
        LowRankConfig(rank=3, backbone="crnet", dense_first=1),
    ],
    ids=["dense in one block", "sparse part", "crnet"],
)
def test_what_cannot_be_split_has_no_plan(low_rank: LowRankConfig, tmp_path: Path) -> None:
    assert plan_of(low_rank, tmp_path) is None


def test_what_is_unfolded_has_no_plan() -> None:
    assert trained(COLA_DLR).config.base_model_tp_plan is None
    assert trained(LowRankConfig(rank=3, scale="trainable")).config.base_model_tp_plan is None


def test_a_config_that_no_model_has_yet_has_no_plan() -> None:
    assert config(LowRankConfig(rank={"q_proj": 3})).base_model_tp_plan is None
    assert tensor_parallel_plan(None, None, 2) is None


@pytest.mark.apart
def test_two_processes_compute_and_save_what_one_does(tmp_path: Path) -> None:
    for name, low_rank in (("cola", COLA_DLR), ("linear", LowRankConfig(rank=3, residual=ResidualConfig()))):
        model = trained(low_rank, num_key_value_heads=2)
        if name == "cola":
            model.save_pretrained(tmp_path / "unfolded")  # of which the head alone is split
            save_file({"tokens": TOKENS, "logits": logits(model)}, tmp_path / "unfolded.expected")
        fold_(model)
        model.save_pretrained(tmp_path / name)
        save_file({"tokens": TOKENS, "logits": logits(model)}, tmp_path / f"{name}.expected")
    program = str(Path(__file__).with_name("tensor_parallel.py"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program]
    done = subprocess.run([*launch, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts.pop("sharded") == {"cola": True, "unfolded": True}
    for where, by_name in facts.items():
        assert by_name["cola"]["module"] == ("foldrank" if where == "with foldrank" else "transformers_modules")
        for name in ("cola", "linear"):
            assert by_name[name]["apart"] < 3e-7
            assert by_name[name]["split"]["self_attn.q_proj.up.weight"] == [SHAPE["hidden_size"] // 2, 3]
            assert by_name[name]["split"]["self_attn.o_proj.down.weight"] == [3, SHAPE["hidden_size"] // 2]
            assert "self_attn.q_proj.down.weight" not in by_name[name]["split"]
        unfolded = by_name["unfolded"]
        assert unfolded["apart"] < 3e-7 if where == "with foldrank" else "not folded" in unfolded["refused"]
