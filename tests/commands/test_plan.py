"""`foldrank plan`: what it prints, that it sums up, and what it says of bad input."""

import json
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foldrank.cli import main


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_parts_sum_to_totals(capsys):
    result = plan(capsys, "llama-60m-cola-dlr", "--gpus", "8")
    sums = [result["parameters"]]
    sums += [way["per_token"] for way in result["flops"]] + [use["bytes_per_gpu"] for use in result["memory"]]
    assert len(sums) == 1 + 3 + 6
    for parts in sums:
        assert parts.pop("total") == sum(parts.values())
    assert result["parameters"]["attention"] + result["parameters"]["mlp"] == sum(
        result["low_rank_parameters"].values()
    )


def test_the_run(capsys):
    result = plan(capsys, "llama-60m-cola", "--gpus", "4", "--mfu", "0.5", "--peak-flops", "1e15", "--steps", "7200")
    assert result["tokens_per_step"] == 512 * 256
    assert result["tokens"] == 7200 * 512 * 256
    assert (result["micro_batch_size"], result["accumulation_steps"]) == (128, 1)
    for way in result["flops"]:
        assert way["per_step"] == way["per_token"]["total"] * 512 * 256
        assert way["hours"] == pytest.approx(way["per_step"] * 2 / (4 * 0.5 * 1e15))
    ways = [None, "latents", "block"]
    assert [way["activation_checkpointing"] for way in result["flops"]] == ways
    assert [(use["strategy"], use["activation_checkpointing"]) for use in result["memory"]] == [
        (strategy, way) for strategy in ("DDP", "FSDP") for way in ways
    ]
    # Each way keeps less and computes more than the one before it.
    computed = [way["per_token"]["total"] for way in result["flops"]]
    kept = [use["bytes_per_gpu"]["blocks"] for use in result["memory"][:3]]
    assert computed == sorted(set(computed))
    assert kept == sorted(set(kept), reverse=True)


@pytest.mark.parametrize("recipe", ["llama-60m-dense", "llama-60m-sltrain-dlr"])
def test_models_without_latents_have_no_way_to_keep_them(capsys, recipe: str):
    result = plan(capsys, recipe)
    assert [way["activation_checkpointing"] for way in result["flops"]] == [None, "block"]
    assert [use["activation_checkpointing"] for use in result["memory"]] == [None, "block"]


def test_fits(capsys):
    result = plan(capsys, "llama-1b-dense", "--gpus", "8", "--gpu-memory", "30")
    needs = [use["bytes_per_gpu"]["total"] / 2**30 for use in result["memory"]]
    assert [use["fits"] for use in result["memory"]] == [need <= 30 for need in needs] == [False, False, True, True]
    assert all(use["fits"] is None for use in plan(capsys, "llama-1b-dense")["memory"])


def test_overrides_are_those_of_pretrain(capsys):
    result = plan(capsys, "demo", "--low_rank", "null", "--model.num_layers", "2", "--train.batch_size", "24")
    assert result["low_rank_parameters"] == {}
    assert result["parameters"]["total"] == result["dense_parameters"]
    assert result["sequences_per_step"] == 24
    assert result["memory"][0]["strategy"] == "one GPU"


def test_nothing_of_the_models_size_is_allocated(capsys):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not result.is_meta:
                self.elements = max(self.elements, result.numel())
            return result

    with Largest() as largest:
        plan(capsys, "llama-7b-cola-dlr", "--gpus", "8")
    assert largest.elements < 10_000


def test_the_tables_name_what_a_person_looks_for(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["plan", "llama-350m-cola-dlr", "--gpus", "2", "--gpu-memory", "74", "--mfu", "0.4"]) == 0
    printed = capsys.readouterr().out
    for text in (
        "185,222,144",
        "367,969,280",
        "7,864,320,000",
        "hours at 40% of 989 TFLOP/s per GPU",
        "fits in 74",
        "checkpointing:",
        "arXiv 2204.02311",
        "FSDP",
    ):
        assert text in printed


def test_seconds_of_a_step_are_the_largest_of_three(capsys):
    arguments = ("llama-7b-cola-dlr", "--gpus", "64", "--sharding", "fsdp", "--bandwidth")
    slow, fast = (plan(capsys, *arguments, speed)["steps_seconds"] for speed in ("50", "1e6"))
    assert {row["strategy"] for row in slow} == {"FSDP"}
    for row, faster in zip(slow, fast, strict=True):
        assert row["at_least"] == row["wire"] == row["bytes_sent"] / 50e9
        assert faster["at_least"] == max(faster["products"], faster["memory"])
    low_rank, dense = slow[:2]
    assert dense["model"] == "dense"
    assert low_rank["over_dense"] == low_rank["wire"] / dense["wire"] < 1


def test_layers_that_are_split_are_held_in_parts(capsys):
    whole, split = (
        plan(capsys, "llama-7b-cola-dlr", "--gpus", str(gpus), "--tensor-parallel", str(gpus)) for gpus in (1, 4)
    )
    assert [use["strategy"] for use in split["memory"]] == ["split"] * 3
    ratio = whole["memory"][0]["bytes_per_gpu"]["weights"] / split["memory"][0]["bytes_per_gpu"]["weights"]
    assert 1.5 < ratio < 1.9
    assert split["accumulation_steps"] * split["micro_batch_size"] == 512


def test_parts_are_shared_out_among_groups_that_split(capsys):
    arguments = ("llama-7b-cola-dlr", "--gpus", "64", "--sharding", "fsdp", "--bandwidth", "50")
    sharded, both = plan(capsys, *arguments), plan(capsys, *arguments, "--tensor-parallel", "4")
    assert {row["strategy"] for row in (*both["memory"], *both["steps_seconds"])} == {"FSDP, split"}
    assert both["accumulation_steps"] * both["micro_batch_size"] == 512 / 16
    a, b = (result["memory"][0]["bytes_per_gpu"] for result in (sharded, both))
    assert 2 < b["weights"] / a["weights"] < 16 / 4  # what is not split, by 16 in place of 64
    assert b["communication"] < a["communication"]
    assert main(["plan", *arguments, "--tensor-parallel", "4"]) == 0
    assert "…" not in capsys.readouterr().out


def test_a_run_that_is_folded_at_the_start_holds_no_effective_weights(capsys):
    arguments = ("llama-7b-cola-dlr", "--gpus", "8", "--sharding", "fsdp")
    folded = plan(capsys, *arguments, "--train.fold_at_start", "true")
    bare = plan(capsys, *arguments, "--low_rank.residual", "null")
    assert folded["memory"][0]["bytes_per_gpu"]["weight_copies"] == 0
    assert folded["memory"][0]["bytes_per_gpu"] == bare["memory"][0]["bytes_per_gpu"]


def test_a_recipe_without_residual_is_split_as_it_is(capsys):
    result = plan(capsys, "llama-7b-cola", "--gpus", "4", "--tensor-parallel", "4", "--bandwidth", "100")
    assert {row["strategy"] for row in result["steps_seconds"]} == {"split"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lama-60m-cola"], "no recipe is called 'lama-60m-cola'; the nearest are llama-60m-cola"),
        (["demo", "--gpus", "0"], "--gpus: must be at least 1, got 0"),
        (["demo", "--gpus", "3"], "batch_size 16 cannot be shared out evenly among 3 processes"),
        (["demo", "--mfu", "40"], "--mfu: must be a number of at least 0 and at most 1, got 40"),
        (["demo", "--gpu-memory", "0"], "--gpu-memory, --bandwidth and --memory-bandwidth must be above 0"),
        (["demo", "--peak-flops", "nan"], "--peak-flops: must be a number of at least 0, got nan"),
        (["demo", "--data.tokenizer", "gpt2"], "the vocabulary of the tokenizer gpt2 is unknown"),
        (["demo", "--low_rank.rank", "300"], "rank 300 is above the full rank 256"),
        (["llama-60m-dense", "--train.activation_checkpointing", "latents"], "the model is dense and has no latents"),
        (["demo", "--gpus", "2", "--bandwidth", "0"], "--bandwidth and --memory-bandwidth must be above 0"),
        (["demo", "--gpus", "2", "--tensor-parallel", "4"], "tensor_parallel 4 splits each layer over 4 processes"),
        (["demo", "--gpus", "3", "--tensor-parallel", "3"], "tensor_parallel 3 does not divide num_attention_heads 4"),
        (["demo", "--gpus", "2", "--train.tensor_parallel", "2"], "set train.fold_at_start true"),
        (["llama-60m-sltrain", "--gpus", "2", "--tensor-parallel", "2"], "there is no plan by which this"),
        (["demo", "--train.split_stream", "true"], "split_stream needs tensor_parallel, the number of processes"),
        (
            ["llama-60m-dense", "--gpus", "2", "--tensor-parallel", "2", "--train.split_stream", "true"],
            "split_stream is for blocks of low-rank layers alone, and self_attn.q_proj is dense: leave it out",
        ),
        (["demo", "--train.activation_checkpointing", "true"], "should be 'block' or 'latents', got 'true'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments: list[str], message: str):
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_stream_that_is_split_leaves_each_gpu_a_quarter_of_the_blocks(capsys):
    arguments = ("llama-7b-cola-dlr", "--gpus", "4", "--tensor-parallel", "4", "--bandwidth", "450")
    layers, stream = plan(capsys, *arguments), plan(capsys, *arguments, "--train.split_stream", "true")
    a, b = (result["memory"][0]["bytes_per_gpu"]["weights"] for result in (layers, stream))
    assert b < 0.7 * a
    sent = [result["steps_seconds"][0]["bytes_sent"] for result in (layers, stream)]
    assert 1.9 < sent[1] / sent[0] < 2.2
    dense = [result["steps_seconds"][1]["bytes_sent"] for result in (layers, stream)]
    assert dense[0] == dense[1]  # whose stream is whole
