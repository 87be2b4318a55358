"""Each benchmark runs, passes its gates, and counts what is there."""

import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foldrank.bench import BENCHMARKS, TRAINING
from foldrank.bench.decode import Decoding
from foldrank.bench.inference_model import bytes_read, load_inference_model, prompt
from foldrank.bench.layer import _gates, _passes
from foldrank.bench.record import Gate
from foldrank.bench.settings import COMPILED, DEFAULT_METHODS, VARIANTS, Settings
from foldrank.bench.trained_model import TrainedModel, outcome_gates, variant_gates
from foldrank.core.residual import DuplicatedLatentResidual
from foldrank.train import chunked_loss
from foldrank.train.accounting import training_flops
from foldrank.train.malloc import KEEP

from ..called import Foldrank

QUICK = {"rounds": 2, "layers": 1, "steps": 3, "new_tokens": 3, "shards": 3}


def measured(run: Foldrank, benchmark: str, recipe: Path, *options: object) -> dict[str, Any]:
    quick = [part for name, value in QUICK.items() for part in (f"--{name.replace('_', '-')}", value)]
    return run("bench", benchmark, "--recipe", recipe, *quick, *options, "--json").json


@pytest.mark.usefixtures("usual_memory")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_runs(foldrank: Foldrank, recipe_file: Path, name: str) -> None:
    found = measured(foldrank, name, recipe_file)
    assert found["settings"]["layers"] == 1
    assert found["settings"]["methods"] == list(DEFAULT_METHODS[name])
    assert found["machine"]["threads"] == torch.get_num_threads()
    keeps = name in TRAINING and platform.libc_ver()[0] == "glibc"
    assert (found["machine"]["allocator"].keys() >= KEEP.keys()) == keeps
    for gate in found["gates"]:
        assert 0 <= gate["difference"] <= gate["bound"]
    assert found["gates"] or name == "loader"
    subjects = {"fold": ["copy", "fold"], "trainer": ["bare loop", "Trainer"], "loader": ["step", "load"]}
    for case in found["cases"].values():
        assert list(case) == subjects.get(name, found["settings"]["methods"])
        for figures in case.values():
            if name != "memory":
                assert len(figures["seconds_of_rounds"]) == 2
                assert min(figures["seconds_of_rounds"]) <= figures["seconds"] <= max(figures["seconds_of_rounds"])
        if name != "memory":
            assert next(iter(case.values()))["ratio"] == [1.0, 1.0, 1.0]
    CHECKS.get(name, lambda _: None)(found)


def check_layer(found: dict[str, Any]) -> None:
    assert list(found["cases"]) == ["32 to 32", "32 to 50", "50 to 32"]
    assert len(found["gates"]) == 3


def check_start(found: dict[str, Any]) -> None:
    for figures in found["cases"]["start"].values():
        assert figures["weights_bytes"] == 4 * figures["parameters"]
        assert figures["peak_bytes"] >= figures["idle_bytes"] > 1 << 20
        assert figures["over_weights"] == (figures["peak_bytes"] - figures["idle_bytes"]) / figures["weights_bytes"]


def check_step(found: dict[str, Any]) -> None:
    figures = found["cases"]["step"]
    assert figures["dense"]["parameters"] > figures["cola"]["parameters"] == figures["cola-dlr"]["parameters"]
    assert figures["cola"]["flops_per_token"] == figures["cola-dlr-folded"]["flops_per_token"]
    assert figures["dense"]["tokens_per_second"] == pytest.approx(4 * 32 / figures["dense"]["seconds"])
    assert [gate["what"].partition(" ")[0] for gate in found["gates"]] == ["losses", "losses", "gradients", "losses"]


def check_memory(found: dict[str, Any]) -> None:
    for method, figures in found["cases"]["step"].items():
        count = figures["weights_bytes"] // 4
        assert figures["optimizer_bytes"] == pytest.approx(8 * count, rel=0.01)  # and step counters
        assert figures["step_peak_bytes"] >= figures["gradients_bytes"] + figures["activations_bytes"] * 0.1
        assert (figures["peak_ratio"] == 1.0) == (method == "dense")


def check_fold(found: dict[str, Any]) -> None:
    figures = found["cases"]["checkpoint"]["fold"]
    assert figures["files"] >= 3
    assert figures["largest_file_bytes"] * figures["files"] >= figures["bytes"]
    assert figures["peak_bytes"] >= figures["idle_bytes"] > 1 << 20


CHECKS = {"layer": check_layer, "start": check_start, "step": check_step, "memory": check_memory, "fold": check_fold}


CHECKPOINTED = ("--methods", "cola-dlr", "cola-dlr-latents", "cola-dlr-checkpointed", "cola-dlr-folded-latents")


def check_checkpointing_gates(found: dict[str, Any]) -> None:
    gates = {gate["what"]: gate for gate in found["gates"]}
    for method in CHECKPOINTED[2:]:
        for what in ("losses", "gradients"):
            assert gates[f"{what} of {method} and cola-dlr"]["difference"] == pytest.approx(
                0.0, abs=1e-6 if "folded" in method else 0.0
            )


def test_what_is_computed_again_takes_the_memory_that_it_should(foldrank: Foldrank, recipe_file: Path) -> None:
    found = measured(foldrank, "memory", recipe_file, "--layers", 2, *CHECKPOINTED)
    check_checkpointing_gates(found)
    bytes_of = {method: figures["activations_bytes"] for method, figures in found["cases"]["step"].items()}
    latents = 2 * 7 * 7 * 4 * 4 * 32  # blocks, layers in each, rank, bytes, tokens
    assert bytes_of["cola-dlr-latents"] - bytes_of["cola-dlr-checkpointed"] == latents
    assert bytes_of["cola-dlr-latents"] == bytes_of["cola-dlr-folded-latents"] < 0.6 * bytes_of["cola-dlr"]


def test_what_is_computed_again_is_counted_and_is_no_use_of_the_peak(foldrank: Foldrank, recipe_file: Path) -> None:
    found = measured(foldrank, "step", recipe_file, *CHECKPOINTED, "--peak-flops", 1e12)
    check_checkpointing_gates(found)
    figures = found["cases"]["step"]
    ways = [figures[method] for method in ("cola-dlr", "cola-dlr-latents", "cola-dlr-checkpointed")]
    flops = [way["flops_per_token"] for way in ways]
    assert flops == sorted(set(flops))
    for way in ways:
        assert way["mfu"] == pytest.approx(flops[0] * way["tokens_per_second"] / 1e12)


@pytest.mark.parametrize("method", ["cola-latents", "cola-checkpointed"])
def test_what_is_computed_otherwise_the_second_time_is_not_timed(recipe_file: Path, method: str) -> None:
    settings = Settings(benchmark="step", recipe=str(recipe_file), methods=[method], layers=1)
    assert [gate.difference for gate in variant_gates(settings)] == [0.0, 0.0]
    subject = TrainedModel(settings, method)

    def stretch(_: nn.Module, __: object, output: Tensor) -> Tensor:
        in_backward = torch._C._current_graph_task_id() != -1
        return output * (1.001 if in_backward else 1.0)

    subject.model.get_submodule("model.layers.0.self_attn.v_proj").register_forward_hook(stretch)
    with pytest.raises(ValueError, match=f"numerics gate: gradients of {method} and cola differ"):
        outcome_gates(settings, method, subject.outcome(), TrainedModel(settings, "cola").outcome())


def test_the_literal_equation_in_a_whole_model_passes_its_gate(foldrank: Foldrank, recipe_file: Path) -> None:
    methods = ("cola", "cola-dlr", "cola-dlr-activations", "cola-dlr-bfloat16")
    found = measured(foldrank, "step", recipe_file, "--methods", *methods)
    gates = {gate["what"]: gate["difference"] for gate in found["gates"]}
    assert 0 < gates["gradients of cola-dlr-activations and cola-dlr"] < 1e-6  # another order of sums
    assert 1e-4 < gates["gradients of cola-dlr-bfloat16 and cola-dlr"] < 5e-2
    assert list(found["cases"]["step"]) == list(methods)


def test_a_folded_model_decodes_the_same_column_by_column(foldrank: Foldrank, recipe_file: Path) -> None:
    found = measured(foldrank, "decode", recipe_file, "--methods", "dense", "cola-dlr", "cola-dlr-columnwise")
    assert [gate["what"] for gate in found["gates"]] == [
        "logits of cola-dlr before and after the fold",
        "logits of cola-dlr-columnwise before and after the fold",
        "logits of cola-dlr-columnwise before and after its weights lay column by column",
    ]
    (figures,) = found["cases"].values()
    assert figures["cola-dlr"]["bytes_read"] == figures["cola-dlr-columnwise"]["bytes_read"]


def test_mfu_is_the_share_of_the_peak(foldrank: Foldrank, recipe_file: Path) -> None:
    options = ("--methods", "cola", "cola-dlr", "--peak-flops", 1e12)
    figures = measured(foldrank, "step", recipe_file, *options)["cases"]["step"]["cola-dlr"]
    recipe = Settings(benchmark="step", recipe=str(recipe_file), layers=1).recipe_of("cola-dlr")
    flops = training_flops(recipe, vocab_size=320).total
    assert figures["flops_per_token"] == flops
    assert figures["mfu"] == pytest.approx(flops * 4 * 32 / figures["seconds"] / 1e12)


@pytest.mark.parametrize("name", ["layer", "step", "prefill", "decode"])
def test_runs_in_bfloat16(foldrank: Foldrank, recipe_file: Path, name: str) -> None:
    found = measured(foldrank, name, recipe_file, "--dtype", "bfloat16")
    assert found["settings"]["dtype"] == "bfloat16"
    assert found["gates"]
    for figures in next(iter(found["cases"].values())).values():
        if name == "decode":  # the weights themselves
            assert figures["bytes_read"] == 2 * (figures["parameters"] - 320 * 32)


def test_the_chunked_loss_is_gated_and_holds_no_logits(foldrank: Foldrank, recipe_file: Path) -> None:
    methods = ("dense", "dense-chunked-loss", "cola-dlr-folded-chunked-loss")
    options = ("--vocabulary", 3000, "--batch-size", 16, "--methods", *methods)
    found = measured(foldrank, "memory", recipe_file, *options)
    for gate in found["gates"]:
        assert 0 <= gate["difference"] <= gate["bound"]
    assert [gate["what"] for gate in found["gates"]] == [
        "losses of cola-dlr before and after the fold",
        "losses of dense-chunked-loss and dense",
        "gradients of dense-chunked-loss and dense",
        "losses of cola-dlr-folded-chunked-loss and cola-dlr",
        "gradients of cola-dlr-folded-chunked-loss and cola-dlr",
    ]
    plain, chunked, _ = found["cases"]["step"].values()
    assert chunked["weights_bytes"] == plain["weights_bytes"]
    logits = 4 * 16 * 32 * 3000
    assert plain["step_peak_bytes"] - chunked["step_peak_bytes"] > logits


def test_trainer_and_a_bare_loop_agree_with_the_chunked_loss(foldrank: Foldrank, recipe_file: Path) -> None:
    found = measured(foldrank, "trainer", recipe_file, "--methods", "cola-dlr-chunked-loss")
    assert [gate["what"] for gate in found["gates"]] == ["weights trained by a bare loop and by Trainer"]


def test_what_is_computed_wrong_by_chunks_is_not_timed(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = ["cola-dlr", "cola-dlr-chunked-loss"]
    settings = Settings(benchmark="step", recipe=str(recipe_file), layers=1, methods=methods)
    assert len(variant_gates(settings)) == 2
    # As if token 5 were padding: its losses are left out.
    monkeypatch.setattr(chunked_loss, "IGNORED", 5)
    with pytest.raises(ValueError, match="losses of cola-dlr-chunked-loss and cola-dlr differ"):
        variant_gates(settings)


@torch.no_grad()
def test_decoding_is_greedy_and_reads_all_weights_but_the_embedding(recipe_file: Path) -> None:
    settings = Settings(benchmark="decode", recipe=str(recipe_file), layers=1, batch_size=2, new_tokens=5)
    model, gates = load_inference_model(settings, "cola-dlr")
    assert [gate.what for gate in gates] == ["logits of cola-dlr before and after the fold"]
    assert not any(isinstance(module, DuplicatedLatentResidual) for module in model.modules())
    ids = prompt(settings)
    decoding = Decoding(model, ids, settings)
    for _ in range(2):  # the cache is made anew
        decoding.prefill()
        tokens = torch.cat([ids, decoding.token, decoding.decode()], dim=1)
        for length in range(32, 32 + 6):
            expected = model(input_ids=tokens[:, :length]).logits[:, -1].argmax(-1)
            assert torch.equal(tokens[:, length], expected)
    weights = dict(model.named_parameters())
    assert bytes_read(model) == 4 * (sum(w.numel() for w in weights.values()) - 320 * 32)


def test_ways_that_compute_something_else_are_not_timed(recipe_file: Path) -> None:
    settings = Settings(benchmark="layer", recipe=str(recipe_file), methods=["cola-dlr", "cola-dlr-activations"])
    passes = _passes(settings, 32, 50)
    assert len(_gates(settings, "case", passes)) == 1
    residual = passes["cola-dlr"].layer.get_submodule("residual")
    assert isinstance(residual, DuplicatedLatentResidual)
    residual.set_alpha(1.01)
    with pytest.raises(ValueError, match="case: outputs and gradients"):
        _gates(settings, "case", passes)


def test_a_gate_refuses_what_is_not_a_number() -> None:
    with pytest.raises(ValueError, match="numerics gate: losses differ by nan"):
        Gate(what="losses", difference=float("nan"), bound=1.0).check()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["step", "--methods", "kola"], "step knows no method 'kola': there are dense and lowrank, cola, sltrain"),
        (["memory", "--methods", "cola-dlr-activations"], "memory knows no method"),
        (["step", "--methods", "cola-activations"], "step knows no method"),
        (["decode", "--methods", "cola-chunked-loss"], "decode knows no method 'cola-chunked-loss'"),
        (["step", "--methods", "cola-folded"], "step knows no method 'cola-folded'"),
        (
            ["step", "--methods", "cola-folded"],
            "any with -latents, -checkpointed, -chunked-loss, -bfloat16, -muon, -spectron, -compiled; those with ",
        ),
        (["decode", "--methods", "cola-latents"], "decode knows no method 'cola-latents'"),
        (["step", "--methods", "cola-latents-checkpointed"], "sets train.activation_checkpointing twice"),
        (["memory", "--methods", "dense-latents"], "the model is dense and has no latents to keep"),
        (["layer", "--methods", "crnet"], "a layer of crnet computes nothing without the block before it"),
        (["memory", "--methods", "sltrain-latents"], "multiply by one dense matrix in training (SLTrain)"),
        (["step", "--methods", "cola-latents-compiled"], "blocks that keep their latents are not compiled"),
        (["steps"], "no benchmark is called 'steps': there are layer, start, step"),
        ([], "name a benchmark: layer, start, step"),
        (["step", "--report"], "--report measures nothing"),
        (["step", "--layers", "0", "--rounds", "1"], "layers must be at least 1, got 0; rounds must be at least 2"),
        (["step", "--recipe", "tiny-dense"], "tiny-dense does not have low-rank layers of one rank"),
        (["step", "--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
        (["step", "--threads", "0"], "--threads: must be at least 1"),
        (["fold", "--methods", "cola", "cola-dlr"], "fold takes one method"),
        (["trainer", "--methods", "cola", "cola-dlr"], "trainer takes one method"),
    ],
)
def test_mistakes_are_one_line(foldrank: Foldrank, options: list[str], complaint: str) -> None:
    done = foldrank("bench", *options)
    assert done.code == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused(foldrank: Foldrank) -> None:
    done = foldrank("bench", "step", "--device", "cuda")
    assert (done.code, "there is no GPU that PyTorch can use" in done.stderr) == (2, True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "fold"])
@pytest.mark.parametrize("compiled", [False, True])
def test_runs_on_a_gpu(foldrank: Foldrank, recipe_file: Path, name: str, compiled: bool) -> None:
    options: list[object] = ["--device", "cuda", "--peak-flops", 989e12]
    if compiled:
        if COMPILED not in {ending for ending, way in VARIANTS.items() if name in way.benchmarks}:
            pytest.skip(f"{name} does not compile")
        options += ["--methods", "dense-compiled", "cola-dlr-compiled"]
    found = measured(foldrank, name, recipe_file, *options)
    assert found["settings"]["dtype"] == "bfloat16"
    assert found["machine"]["device"] == torch.cuda.get_device_name()
    assert all(gate["difference"] <= gate["bound"] for gate in found["gates"])
