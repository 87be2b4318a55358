"""Several processes against one: by DDP, FSDP2, tensor parallelism and both they come to the same weights.

And what they begin with, hold, exchange and leave to others.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .launch import together
from .runs import (
    BOTH,
    COLA,
    FOLDED,
    FSDP,
    LONG,
    MUON,
    NO_RESIDUAL,
    PLAIN,
    SPLIT,
    STREAM,
    TWO_BLOCKS,
    distance,
    losses,
    metrics,
    texts,
)
from .spread import work

pytestmark = pytest.mark.apart

CHUNKS, PASSES = {"train.chunked_loss": True}, {"train.micro_batch_size": 1}

ARMS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "DDP, residual": ({}, {**COLA, **MUON, **LONG}),
    "DDP, folded at the start": ({}, {**PLAIN, **FOLDED, **LONG}),
    "DDP, compiled blocks": ({"train.compile": "blocks"}, COLA),
    "FSDP, residual, AdamW": (FSDP, {**COLA, **LONG}),
    "FSDP, residual, Muon": (FSDP, {**PLAIN, **MUON, **LONG}),
    "FSDP, folded at the start, Muon": (FSDP, {**COLA, **FOLDED, **MUON, **LONG}),
    "FSDP, folded at the start, AdamW": (FSDP, {**PLAIN, **FOLDED, **LONG}),
    "FSDP, no residual, accumulated": (FSDP, {**COLA, **NO_RESIDUAL, **PASSES, **TWO_BLOCKS}),
    "split, folded at the start, AdamW": (SPLIT, {**COLA, **FOLDED, **LONG}),
    "split, folded at the start, Muon": (SPLIT, {**PLAIN, **FOLDED, **MUON, **LONG}),
    "split, no residual, by chunks": (SPLIT, {**COLA, **NO_RESIDUAL, **CHUNKS, **LONG}),
    "split, dense": (SPLIT, {"low_rank": None, **TWO_BLOCKS}),
    "split, Qwen3": (SPLIT, {**COLA, **FOLDED}),
    "both, folded at the start, Muon": (BOTH, {**PLAIN, **FOLDED, **MUON}),
    "both, no residual, accumulated, by chunks": (BOTH, {**COLA, **NO_RESIDUAL, **CHUNKS, **PASSES}),
    "both, dense": (BOTH, {"low_rank": None}),
    "both, Qwen3, accumulated": (BOTH, {**COLA, **FOLDED, **PASSES}),
    "stream, folded at the start, AdamW": (STREAM, {**COLA, **FOLDED}),
    "stream, folded at the start, Muon, by chunks": (STREAM, {**PLAIN, **FOLDED, **MUON, **CHUNKS}),
    "stream and shares, Qwen3": ({**STREAM, **FSDP}, {**COLA, **FOLDED}),
}
"""How the processes share the work, and what they train in float64."""

PROCESSES = {
    arm: 4 if FSDP.items() <= how.items() and SPLIT.items() <= how.items() else 2 for arm, (how, _) in ARMS.items()
}

AGAIN = {
    "both, Qwen3, accumulated": (2, SPLIT),
    "both, folded at the start, Muon": (2, STREAM),
    "stream and shares, Qwen3": (2, FSDP),
    "split, folded at the start, AdamW": (4, BOTH),
}
"""What goes on from the middle in so many processes, which share the work in another way."""

SHORT = {**COLA, "train.steps": 4}
TIED = {**SHORT, "model.tie_embeddings": True}

BY_FOUR: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (FSDP, {**COLA, **LONG}),
    ({}, {**COLA, **MUON, **LONG}),
    ({"train.tensor_parallel": 4}, {**COLA, **FOLDED, **LONG}),
]
"""How four processes share the work, and what they train in float32."""

BLOCK = {"train.activation_checkpointing": "block"}
EXCHANGED: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "DDP": COLA,
        "FSDP": {**FSDP, **COLA},
        "FSDP, two passes": {**FSDP, **COLA, **PASSES},
        "FSDP, computed again": {**FSDP, **COLA, **BLOCK},
        "split": {**SPLIT, **COLA, **FOLDED},
        "split, two passes": {**SPLIT, **COLA, **FOLDED, "train.micro_batch_size": 2},
        "split, computed again": {**SPLIT, **COLA, **FOLDED, **BLOCK},
        "split, dense": {**SPLIT, "low_rank": None},
        "stream": {**STREAM, **COLA, **FOLDED},
        "stream, two passes, computed again": {**STREAM, **COLA, **FOLDED, "train.micro_batch_size": 2, **BLOCK},
    },
    4: {
        "folded": {**BOTH, **COLA, **FOLDED},
        "computed again, two passes": {**BOTH, **COLA, **FOLDED, **PASSES, **BLOCK},
        "dense": {**BOTH, "low_rank": None},
        "stream": {**BOTH, **STREAM, **COLA, **FOLDED},
    },
}


class Done:
    """What one, two and four processes have done: runs in `FOLDER/PROCESSES/NAME`, and the facts of each process.

    In few launches, since most of what the first run of one takes is DTensor's, which keeps how it spreads operations.
    """

    def __init__(self, tiny: Path, folder: Path) -> None:
        self._tiny, self._folder = tiny, folder
        first = [self._run(1, "first", {**SHORT, **FOLDED}), self._run(1, "first, tied", TIED)]
        runs = [*first, *self._arms(1), *self._by_four(1), *self._begun(1)]
        self.alone = self._launch("alone", 1, runs, bytes=str(tiny))
        self._launch("four", 4, [*self._arms(4), *self._by_four(4)])
        runs = [*self._arms(2), *self._again(2), *self._begun(2)]
        two = self._launch("two", 2, runs, wire=self._steps(2), bytes=str(tiny), read=self._checkpoint())
        four = self._launch("four again", 4, [*self._again(4), *self._begun(4)], wire=self._steps(4))
        self.facts = {2: two, 4: four}
        self._launch("reads", 1, [], read=self._checkpoint())

    def out(self, processes: int, name: str) -> Path:
        return self._folder / str(processes) / name

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """All that a launch read of a checkpoint."""
        return torch.load(self._folder / name / "read.pt")

    def _launch(self, name: str, processes: int, runs: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
        folder = self._folder / name
        return together(work, folder, {"runs": runs, **more}, folder, processes=processes)

    def _run(self, processes: int, name: str, settings: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """What `pretrain` is called with, which writes no page: that would take as long as the training."""
        recipe = self._tiny.with_name("qwen3.yaml") if "Qwen3" in name else self._tiny
        out = self.out(processes, name)
        return {"recipe": str(recipe), "settings": settings, "out": out, "float64": name in ARMS, **more}

    def _arms(self, processes: int) -> list[dict[str, Any]]:
        return [
            self._run(processes, arm, {**(how if processes > 1 else {}), **what})
            for arm, (how, what) in ARMS.items()
            if processes in (1, PROCESSES[arm])
        ]

    def _by_four(self, processes: int) -> list[dict[str, Any]]:
        return [
            self._run(processes, f"long {number}", {**(how if processes > 1 else {}), **what})
            for number, (how, what) in enumerate(BY_FOUR)
        ]

    def _again(self, processes: int) -> list[dict[str, Any]]:
        """Copies of runs by another number of processes, without their second half."""
        arms = [arm for arm, (count, _) in AGAIN.items() if count == processes]
        for arm in arms:
            before, out = self.out(PROCESSES[arm], arm), self.out(processes, arm)
            shutil.copytree(before, out)
            saved = out.glob("checkpoints/checkpoint-*")
            last = max(saved, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]))
            for later in (last, out / "unfolded", out / "folded"):
                shutil.rmtree(later)
            (out / "metrics.json").unlink()
        return [self._run(processes, arm, {**AGAIN[arm][1], **ARMS[arm][1]}, resume=True) for arm in arms]

    def _begun(self, processes: int) -> list[dict[str, Any]]:
        """With a stream, and with the weights of another run."""
        how: dict[str, Any] = {1: {}, 2: SPLIT, 4: BOTH}[processes]
        first, tied = self.out(1, "first"), self.out(1, "first, tied")
        stream = {"data.stream": True, "data.tokenizer": str(first / "folded"), "data.vocab_size": 512}
        second = {**SHORT, **FOLDED, "seed": 1}
        runs = [
            self._run(processes, "stream", {**SHORT, **FOLDED, **stream, **how}),
            self._run(processes, "second", {**second, **how}, init_from=first),
        ]
        if processes < 4:
            shards = FSDP if processes == 2 else {}
            second = {**TIED, **NO_RESIDUAL, **shards, "seed": 1}
            runs.append(self._run(processes, "second, tied", second, init_from=tied))
        return runs

    def _steps(self, processes: int) -> dict[str, tuple[str, dict[str, Any]]]:
        return {way: (str(self._tiny), {**how, **TWO_BLOCKS}) for way, how in EXCHANGED[processes].items()}

    def _checkpoint(self) -> tuple[str, dict[str, Any], str]:
        return str(self._tiny), LONG, str(self.out(4, "long 0") / "checkpoints" / "checkpoint-50")


@pytest.fixture(scope="module")
def done(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    return Done(tiny, tmp_path_factory.mktemp("spread"))


@pytest.mark.parametrize("arm", ARMS)
def test_several_processes_come_to_the_weights_of_one(done: Done, arm: str) -> None:
    one, several = done.out(1, arm), done.out(PROCESSES[arm], arm)
    assert metrics(several)["val_loss_folded"] == pytest.approx(metrics(one)["val_loss_folded"], rel=1e-9)
    assert distance(one, several) < 1e-9
    steps = ARMS[arm][1].get("train.steps", 8)
    assert len(losses(one)) == steps
    assert losses(several) == pytest.approx(losses(one), rel=1e-6)  # Trainer logs them in float32
    assert texts(several) == texts(one)
    assert [step for step, _ in texts(several)] == [steps]
    assert metrics(several)["start_loss"] == pytest.approx(metrics(one)["start_loss"], rel=1e-9)


@pytest.mark.parametrize("arm", AGAIN)
def test_a_run_goes_on_spread_in_another_way(done: Done, arm: str) -> None:
    one, again = done.out(1, arm), done.out(AGAIN[arm][0], arm)
    assert distance(one, again) < 1e-9
    assert losses(again) == pytest.approx(losses(one), rel=1e-6)


@pytest.mark.parametrize("processes", [2, 4])
def test_all_who_split_a_layer_get_the_same_of_a_stream(done: Done, processes: int) -> None:
    one, several = done.out(1, "stream"), done.out(processes, "stream")
    assert losses(several) == pytest.approx(losses(one), rel=1e-5)
    assert distance(one, several) < 1e-5


@pytest.mark.parametrize(("name", "processes"), [("second, tied", 2), ("second", 2), ("second", 4)])
def test_they_begin_with_the_weights_of_another_run(done: Done, name: str, processes: int) -> None:
    one, several = done.out(1, name), done.out(processes, name)
    assert losses(several) == pytest.approx(losses(one), rel=1e-5)
    assert distance(one, several) < 1e-5
    assert metrics(several)["val_loss"] == pytest.approx(metrics(one)["val_loss"], rel=1e-5)
    assert metrics(several)["lineage"] == metrics(one)["lineage"]
    assert metrics(several)["lineage"][0].startswith("began with the weights of the run")


@pytest.mark.parametrize("number", range(len(BY_FOUR)))
def test_four_processes_come_to_the_weights_of_one_in_float32(done: Done, number: int) -> None:
    one, four = (done.out(processes, f"long {number}") for processes in (1, 4))
    assert len(losses(one)) == 50
    assert losses(four) == pytest.approx(losses(one), rel=1e-5)
    assert distance(one, four) < 1e-5


def test_a_checkpoint_of_four_processes_is_read_by_two_and_one(done: Done) -> None:
    one, four = (done.out(processes, "long 0") / "checkpoints" / "checkpoint-50" for processes in (1, 4))
    for name in ("config.json", "generation_config.json", "modeling_lowrank_llama.py", "tokenizer.json"):
        assert (four / name).read_text() == (one / name).read_text()
    by_two, by_one = done.read("two"), done.read("reads")
    weights = load_file(four / "model.safetensors")
    assert all(torch.equal(by_one[name], tensor) for name, tensor in weights.items())
    assert len(by_one) > 2 * len(weights)  # and the optimizer's state
    assert all(torch.equal(by_two[name], tensor) for name, tensor in by_one.items())


def test_each_of_two_shards_holds_about_half(done: Done) -> None:
    (one,) = done.alone
    for facts in done.facts[2]:
        assert facts["bytes"] <= 0.6 * one["bytes"]


@pytest.mark.parametrize(("processes", "way"), [(count, way) for count, ways in EXCHANGED.items() for way in ways])
def test_what_processes_exchange_is_what_the_formula_says(done: Done, processes: int, way: str) -> None:
    for facts in done.facts[processes]:
        counted, formula = facts[way]
        assert counted == formula
        assert any(counted.values()) if processes == 2 else all(counted.values())


def test_a_split_block_sums_seven_latents_and_a_dense_one_four_states(done: Done) -> None:
    blocks, tokens, rank, width = 2, 4 * 16, 4, 16
    for facts in done.facts[2]:
        assert facts["split"][0]["summed"] == 4 * 7 * rank * tokens * blocks
        assert facts["split, dense"][0]["summed"] == 4 * 4 * width * tokens * blocks
