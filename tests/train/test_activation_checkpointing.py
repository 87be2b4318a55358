"""Keeping less for the backward pass changes neither losses nor gradients, and keeps what it says."""

import copy
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported
from transformers import GPT2Config, GPT2LMHeadModel

from foldrank.bench.memory import allocated
from foldrank.core.anchored_decay import fold_at_start_
from foldrank.core.config import LowRankConfig, ResidualConfig
from foldrank.core.inventory import low_rank_layers
from foldrank.core.linear import LowRankLinear
from foldrank.recipes.model_config import ModelConfig
from foldrank.recipes.schema import Recipe
from foldrank.recipes.train_config import Checkpointing, TrainConfig
from foldrank.surgery.factorize import factorize_
from foldrank.train import activation_checkpointing
from foldrank.train.activation_checkpointing import checkpoint_activations_
from foldrank.train.model import build_model

from ..called import Foldrank
from ..small_runs import Run

SHAPE = ModelConfig(hidden_size=32, intermediate_size=50, num_layers=2, num_heads=2)
VOCABULARY = 61
COLA_DLR = LowRankConfig(rank=7, activation="silu", residual=ResidualConfig())
LOW_RANK = {
    "lowrank": LowRankConfig(rank=7),
    "cola": LowRankConfig(rank=7, activation="silu"),
    "cola-dlr": COLA_DLR,
    "lowrank-dlr": LowRankConfig(rank=7, residual=ResidualConfig()),
    "trainable": LowRankConfig(
        rank=30, activation="gelu", scale="trainable", residual=ResidualConfig(trainable=True, expansion="random")
    ),
    "attention alone": replace(COLA_DLR, targets=("q_proj", "k_proj", "v_proj", "o_proj")),
    "sltrain with an activation": LowRankConfig(
        rank=7, backbone="sltrain", activation="silu", extra_config={"density": 0.1}, residual=ResidualConfig()
    ),
}
KEPT = pytest.mark.parametrize("kept", ["block", "latents"])


def model_of(low_rank: LowRankConfig | None, kept: Checkpointing | None = None) -> Any:
    recipe = Recipe(model=SHAPE, low_rank=low_rank, train=TrainConfig(activation_checkpointing=kept))
    return build_model(recipe, VOCABULARY).train()


def loss_of(model: Any, step: int = 0) -> Tensor:
    ids = torch.randint(VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(step))
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def losses_and_gradients(model: Any, *, bfloat16: bool = False) -> list[Tensor]:
    """Of three steps, so that nothing is as it started."""
    found, optimizer = [], torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = loss_of(model, step)
        loss.backward()
        found += [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
        optimizer.step()
        optimizer.zero_grad()
    return found


def left_by_a_forward_pass(model: Any) -> int:
    """Bytes, as the profiler counts them."""
    kept: list[Tensor] = []
    return allocated(lambda: kept.append(loss_of(model)), "cpu")[0]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@KEPT
@pytest.mark.parametrize("method", LOW_RANK)
def test_losses_and_gradients_stay_the_same_to_the_last_bit(method: str, kept: Checkpointing) -> None:
    expected = losses_and_gradients(model_of(LOW_RANK[method]).double())
    assert_equal(losses_and_gradients(model_of(LOW_RANK[method], kept).double()), expected)


@KEPT
@pytest.mark.parametrize("method", ["lowrank", "cola-dlr"])
def test_the_same_in_bfloat16(method: str, kept: Checkpointing) -> None:
    expected = losses_and_gradients(model_of(LOW_RANK[method]), bfloat16=True)
    assert_equal(losses_and_gradients(model_of(LOW_RANK[method], kept), bfloat16=True), expected)


@KEPT
def test_the_same_when_folded_at_the_start(kept: Checkpointing) -> None:
    found = []
    for way in (None, kept):
        model = model_of(COLA_DLR, way).double()
        fold_at_start_(model)
        found.append(losses_and_gradients(model))
    assert_equal(*found)


def test_other_architectures_and_their_dropout() -> None:
    """GPT-2 has another kind of linear layer, with biases, and draws random numbers in each block."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    found = []
    for kept in (None, "latents"):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).double().train()
        factorize_(model, COLA_DLR)
        assert len(checkpoint_activations_(model, kept)) == (8 if kept else 0)
        found.append(losses_and_gradients(model.double()))
    assert_equal(*found)


def test_layers_whose_latents_are_kept_are_named() -> None:
    assert checkpoint_activations_(model_of(COLA_DLR), "latents") == tuple(low_rank_layers(model_of(COLA_DLR)))
    assert checkpoint_activations_(model_of(COLA_DLR), "block") == ()
    assert not model_of(COLA_DLR).is_activation_checkpointing


def test_nothing_of_it_is_in_the_state_dict_and_copies_have_it_too() -> None:
    model = model_of(COLA_DLR, "latents")
    assert model.state_dict().keys() == model_of(COLA_DLR).state_dict().keys()
    expected = losses_and_gradients(model_of(COLA_DLR))
    assert_equal(losses_and_gradients(copy.deepcopy(model)), expected)


def test_it_can_be_undone_and_done_again() -> None:
    model = model_of(COLA_DLR, "latents")
    model.activation_checkpointing_disable()
    checkpoint_activations_(model, "block")
    checkpoint_activations_(model, "latents")
    assert_equal(losses_and_gradients(model), losses_and_gradients(model_of(COLA_DLR)))


def test_an_error_in_a_layer_leaves_no_mark() -> None:
    model = model_of(COLA_DLR, "latents")
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, LowRankLinear)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.zeros(2, 31))
    assert not activation_checkpointing._in_down_projection.get()


@pytest.mark.parametrize(
    ("low_rank", "complaint"),
    [
        (None, "the model is dense and has no latents to keep; take block"),
        (
            LowRankConfig(rank=7, backbone="sltrain"),
            "14 layers, such as model.layers.0.self_attn.q_proj, multiply by one dense matrix in training (SLTrain)",
        ),
    ],
)
def test_models_without_latents_are_refused(low_rank: LowRankConfig | None, complaint: str) -> None:
    model = model_of(low_rank)
    with pytest.raises(ValueError, match=re.escape(f"activation_checkpointing latents: {complaint}")):
        checkpoint_activations_(model, "latents")
    assert not model.is_activation_checkpointing
    with pytest.raises(ValueError, match="take block"):
        model_of(low_rank, "latents")
    assert_equal(losses_and_gradients(model_of(low_rank, "block")), losses_and_gradients(model_of(low_rank)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of transformers' own hook
def test_compiled_blocks_keep_their_latents_by_running_as_they_are() -> None:
    expected = losses_and_gradients(model_of(COLA_DLR))
    model = model_of(COLA_DLR, "latents")
    model.compile(backend="eager")
    assert_equal(losses_and_gradients(model), expected)
    # The compiler may keep less of embedding and head; the latents are 30 % of what blocks leave otherwise.
    assert left_by_a_forward_pass(model) > 1.1 * left_by_a_forward_pass(model_of(COLA_DLR, "block"))
    whole = model_of(COLA_DLR, "latents")
    torch._dynamo.reset()
    whole.compile(backend="eager", fullgraph=True)
    with pytest.raises(Unsupported, match="ContextVar"):
        losses_and_gradients(whole)


@KEPT
def test_a_run_gives_what_it_gives_without(
    foldrank: Foldrank, finished_run: Run, tmp_path: Path, kept: Checkpointing
) -> None:
    """Evaluations, the fold and the saved models included; and a checkpoint goes on."""
    out = tmp_path / "run"
    command = ("pretrain", finished_run.recipe, "--train.activation_checkpointing", kept, "--train.save_every", 5)
    done = foldrank(*command, "--out", out, "--json").json
    for key in ("val_loss", "val_loss_folded", "folded_layers", "sample"):
        assert done[key] == finished_run.metrics[key]
    assert done["flops_per_token"] > finished_run.metrics["flops_per_token"]
    assert done["memory_bytes"]["blocks"] < finished_run.metrics["memory_bytes"]["blocks"]
    weights = (out / "folded" / "model.safetensors").read_bytes()
    assert weights == (finished_run.out / "folded" / "model.safetensors").read_bytes()
    assert (out / "folded" / "config.json").read_text() == (finished_run.out / "folded" / "config.json").read_text()

    (out / "metrics.json").unlink()
    for folder in ("folded", "unfolded", "checkpoints/checkpoint-12"):
        shutil.rmtree(out / folder)
    again = foldrank(*command, "--out", out, "--resume", "--json").json
    assert again["resumed_at_step"] == 10
    assert [row["val_loss"] for row in again["history"]] == [row["val_loss"] for row in done["history"]]
    assert (out / "folded" / "model.safetensors").read_bytes() == weights


def test_a_run_without_latents_is_refused_before_it_begins(
    foldrank: Foldrank, finished_run: Run, tmp_path: Path
) -> None:
    options = ("--train.activation_checkpointing", "latents", "--low_rank", "null")
    done = foldrank("pretrain", finished_run.recipe, "--out", tmp_path / "run", *options)
    assert (done.code, "the model is dense and has no latents to keep" in done.stderr) == (2, True)
    assert not (tmp_path / "run").exists()
