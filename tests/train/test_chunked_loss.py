"""The loss by chunks against the plain one: value and every gradient, in training alone, and nothing else changes."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from foldrank.recipes.model_config import ModelConfig
from foldrank.recipes.schema import Recipe
from foldrank.recipes.train_config import TrainConfig
from foldrank.train import chunked_loss
from foldrank.train.chunked_loss import chunk_loss_, is_chunked, linear_cross_entropy
from foldrank.train.evaluate import evaluate_loss
from foldrank.train.model import build_model

from .test_trainer import SMALL, trainer_of

VOCABULARY = 301
DENSE = Recipe(
    model=ModelConfig(hidden_size=32, intermediate_size=50, num_layers=2, num_heads=2),
    train=TrainConfig(batch_size=3, sequence_length=17, device="cpu"),
)
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "tied": {"model.tie_embeddings": True},
    "cola-dlr": {"low_rank.rank": 7, "low_rank.activation": "silu", "low_rank.residual.alpha": 1.0},
}
EVERY = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def chunks_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many that small batches have several, the last one short."""
    monkeypatch.setattr(chunked_loss, "CHUNK", 8)


def both(method: str) -> tuple[Any, Any]:
    """The same model with the plain loss and with the chunked one."""
    recipe = DENSE.override(METHODS[method])
    plain, chunked = (build_model(recipe.override({"train.chunked_loss": on}), VOCABULARY) for on in (False, True))
    return plain.train(), chunked.train()


def batch(*, padded: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(0))
    if not padded:
        return {"input_ids": ids, "labels": ids}
    real = torch.arange(17) < torch.tensor([[17], [9], [2]])
    return {"input_ids": ids, "attention_mask": real.long(), "labels": ids.where(real, -100)}


def loss_and_gradients(model: Any, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**inputs, use_cache=False, **options).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return {"loss": loss.detach(), **found}


def distance(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, over that of what is expected."""
    assert found.dtype == expected.dtype
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("items", [None, 100, torch.tensor(100)], ids=["mean", "number", "tensor"])
@EVERY
def test_loss_and_all_gradients_are_the_plain_ones(method: str, padded: bool, items: int | Tensor | None) -> None:
    inputs = batch(padded=padded)
    options = {} if items is None else {"num_items_in_batch": items}
    expected, found = (loss_and_gradients(model, inputs, **options) for model in both(method))
    assert found.keys() == expected.keys()
    assert max(distance(found[name], expected[name]) for name in expected) < 1e-6


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@EVERY
def test_in_float64_they_are_those_of_the_equation(method: str, padded: bool) -> None:
    # The loss of transformers is float32 whatever the model's dtype, so the equation stands here.
    plain, chunked = (model.double() for model in both(method))
    inputs = batch(padded=padded)
    labels = inputs.pop("labels")
    logits = plain(**inputs).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
    expected.backward()
    found = loss_and_gradients(chunked, {**inputs, "labels": labels})
    assert distance(found.pop("loss"), expected.detach()) < 1e-14
    assert max(distance(found[name], parameter.grad) for name, parameter in plain.named_parameters()) < 1e-13


@EVERY
def test_in_bfloat16_they_agree_to_its_rounding_and_the_loss_is_float32(method: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (loss_and_gradients(model, batch(padded=True)) for model in both(method))
    assert found["loss"].dtype == torch.float32
    assert distance(found["loss"], expected["loss"]) < 1e-6
    assert max(distance(found[name], expected[name]) for name in expected) < 5e-3


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 40])
@pytest.mark.parametrize("upstream", [1.0, -2.5])
def test_any_number_of_tokens_and_any_upstream_gradient(tokens: int, upstream: float) -> None:
    draw = torch.Generator().manual_seed(1)
    items = torch.tensor(3)
    hidden, weight = (torch.randn(n, 5, generator=draw, dtype=torch.float64) for n in (tokens, 11))
    labels = torch.randint(11, (tokens,), generator=draw)
    labels[1::3] = -100
    found, expected = [], []
    for way, result in ((linear_cross_entropy, found), (None, expected)):
        h, w = (tensor.clone().requires_grad_() for tensor in (hidden, weight))
        loss = way(h, w, labels, items) if way else F.cross_entropy(h @ w.T, labels, reduction="sum") / items
        (upstream * loss).backward()
        result += [loss.detach(), h.grad, w.grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_in_bfloat16_the_chunks_of_the_weights_gradient_sum_in_float32() -> None:
    draw = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 16, generator=draw) for n in (800, 11))
    labels = torch.randint(11, (800,), generator=draw)
    gradients = []
    for narrow in (False, True):
        w = weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            linear_cross_entropy(hidden, w, labels, torch.tensor(800)).backward()
        gradients.append(w.grad)
    assert distance(gradients[1], gradients[0]) < 3e-3  # of a hundred chunks; 1e-2 where they sum in bfloat16


def test_large_logits_neither_overflow_nor_vanish() -> None:
    hidden = torch.full((9, 4), 1e3)
    weight = torch.linspace(-1, 1, 44).view(11, 4)
    labels = torch.arange(9)
    expected = F.cross_entropy(hidden @ weight.T, labels)
    assert torch.isfinite(expected)
    assert distance(linear_cross_entropy(hidden, weight, labels, torch.tensor(9)), expected) < 1e-6


def test_where_no_label_counts_the_loss_is_as_undefined_as_the_plain_one() -> None:
    inputs = batch() | {"labels": torch.full((3, 17), -100)}
    for model in both("dense"):
        assert torch.isnan(model(**inputs).loss)


@EVERY
def test_evaluation_and_generation_are_the_plain_ones(method: str) -> None:
    plain, chunked = both(method)
    sequences: Any = [{"input_ids": row, "labels": row} for row in batch()["input_ids"]]
    assert evaluate_loss(chunked, sequences) == evaluate_loss(plain, sequences)
    assert chunked.training
    with torch.no_grad():  # in training mode too, where nothing is learned
        assert torch.equal(chunked(**batch()).logits, plain(**batch()).logits)
    prompt = batch()["input_ids"][:, :4]
    generated = [model.eval().generate(prompt, max_new_tokens=5, do_sample=False) for model in (plain, chunked)]
    assert torch.equal(*generated)
    outputs = [model(**batch()) for model in (plain, chunked)]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert torch.equal(outputs[0].logits, outputs[1].logits)


@EVERY
def test_state_dict_class_and_checkpoint_are_the_plain_ones(method: str, tmp_path: Path) -> None:
    plain, chunked = both(method)
    assert type(chunked) is type(plain)
    assert type(chunked.get_output_embeddings()) is nn.Linear
    assert chunked.state_dict().keys() == plain.state_dict().keys()
    for name, model in (("plain", plain), ("chunked", chunked)):
        model.save_pretrained(tmp_path / name)
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("plain", "chunked")]
    assert files[0] == files[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "chunked").train()
    assert loaded(**batch()).logits.shape == (3, 17, VOCABULARY)


def test_a_copy_computes_with_its_own_weights() -> None:
    _, chunked = both("dense")
    other = copy.deepcopy(chunked)
    before = chunked(**batch()).loss
    with torch.no_grad():
        chunked.get_output_embeddings().weight.zero_()
    assert chunked(**batch()).loss.item() == pytest.approx(torch.tensor(float(VOCABULARY)).log().item())
    assert torch.equal(other(**batch()).loss, before)


# Dynamo's own: it makes an instance where its trace of an autograd.Function begins.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_it_is_the_same() -> None:
    plain, chunked = both("cola-dlr")
    expected, found = (
        loss_and_gradients(plain, batch()),
        loss_and_gradients(torch.compile(chunked, backend="aot_eager"), batch()),
    )
    for name, value in expected.items():
        assert distance(found[name if name in found else f"_orig_mod.{name}"], value) < 1e-6


def test_other_heads_are_refused() -> None:
    _, model = both("dense")
    model.set_output_embeddings(nn.Linear(32, VOCABULARY))
    with pytest.raises(ValueError, match=r"output head of this LlamaForCausalLM is Linear.*bias=True.*leave it out"):
        chunk_loss_(model)


@pytest.fixture
def process_group() -> Iterator[None]:
    """This process as a group of one, whose collectives are real."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# FSDP2 has no unit that shares a weight with another, so there a tied head is in the root.
@pytest.mark.parametrize(
    ("method", "way"),
    [*((method, way) for method in METHODS for way in ("DDP", "FSDP2")), ("dense", "FSDP2, the head a unit")],
)
@pytest.mark.usefixtures("process_group")
def test_wrapped_for_several_processes_it_is_the_same(method: str, way: str) -> None:
    plain, chunked = both(method)
    expected = loss_and_gradients(plain, batch())
    wrapped: Any = chunked
    if way == "DDP":
        wrapped = DistributedDataParallel(chunked)
    else:
        mesh = init_device_mesh("cpu", (1,))
        units = [*chunked.model.layers, *([chunked.lm_head] if way.endswith("unit") else [])]
        for unit in (*units, chunked):
            fully_shard(unit, mesh=mesh)
    found = loss_and_gradients(wrapped, batch())
    for name, value in expected.items():
        gradient: Any = found[name if name in found else f"module.{name}"]
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        assert distance(whole, value) < 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 5e-3)])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_trainer_comes_to_the_same_losses_and_gradients(
    dtype: str, bound: float, micro_batch_size: int | None, tmp_path: Path
) -> None:
    def entries(*, chunked: bool) -> list[float]:
        few = {"train.steps": 3, "train.warmup_ratio": 0, "train.save_every": 100, "train.dtype": dtype}
        settings = {**few, "train.micro_batch_size": micro_batch_size, "train.chunked_loss": chunked}
        trainer = trainer_of(SMALL.override(settings), tmp_path / str(chunked))
        trainer.train()
        return [entry[name] for entry in trainer.state.log_history if "loss" in entry for name in ("loss", "grad_norm")]

    plain = entries(chunked=False)
    assert len(plain) == 6
    assert plain[0] != pytest.approx(plain[2], rel=1e-3), "a step should change something"
    assert entries(chunked=True) == pytest.approx(plain, rel=bound)


def test_copies_and_replicas_compute_by_themselves() -> None:
    plain, model = both("dense")
    assert is_chunked(model)
    assert not is_chunked(plain)
    duplicate = copy.deepcopy(model)
    replica = model._replicate_for_data_parallel()
    for one in (duplicate, replica):
        assert one.forward.__self__ is one
    assert duplicate.lm_head.forward.__self__ is duplicate.lm_head
    assert is_chunked(duplicate)
