"""Several processes in float32: what they begin with, hold, exchange and leave to others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .runs import (
    BOTH,
    COLA,
    FOLDED,
    FSDP,
    LONG,
    MUON,
    NO_RESIDUAL,
    SPLIT,
    STREAM,
    TWO_BLOCKS,
    distance,
    launch,
    losses,
    metrics,
    run,
)

pytestmark = pytest.mark.apart

SHORT = {**COLA, "train.steps": 4}
TIED = {**SHORT, "model.tie_embeddings": True}
HOWS: dict[int, dict[str, Any]] = {1: {}, 2: SPLIT, 4: BOTH}

BY_FOUR: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (FSDP, {**COLA, **LONG}),
    ({}, {**COLA, **MUON, **LONG}),
    ({"train.tensor_parallel": 4}, {**COLA, **FOLDED, **LONG}),
]
"""How four processes share the work, and what they train."""

BLOCK = {"train.activation_checkpointing": "block"}
EXCHANGED: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "DDP": COLA,
        "FSDP": {**FSDP, **COLA},
        "FSDP, two passes": {**FSDP, **COLA, "train.micro_batch_size": 1},
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
        "computed again, two passes": {**BOTH, **COLA, **FOLDED, "train.micro_batch_size": 1, **BLOCK},
        "dense": {**BOTH, "low_rank": None},
        "stream": {**BOTH, **STREAM, **COLA, **FOLDED},
    },
}


class Done:
    """What one, four and two processes have done, each number in one launch: `FOLDER/NAME-PROCESSES` for each run."""

    def __init__(self, tiny: Path, folder: Path) -> None:
        self.folder, self._tiny = folder, tiny
        first = [self._run("first", 1, {**SHORT, **FOLDED}), self._run("first-tied", 1, TIED)]
        self.facts = {1: launch({"runs": [*first, *self._runs(1)], "bytes": str(tiny)}, folder / "1", processes=1)}
        for processes in (4, 2):
            wire = {name: (str(tiny), {**settings, **TWO_BLOCKS}) for name, settings in EXCHANGED[processes].items()}
            tasks = {"runs": self._runs(processes), "wire": wire}
            if processes == 2:
                tasks |= {"bytes": str(tiny), "read": self._checkpoint()}
            self.facts[processes] = launch(tasks, folder / str(processes), processes=processes)
        launch({"read": self._checkpoint()}, folder / "read", processes=1)

    def out(self, name: str, processes: int) -> Path:
        return self.folder / f"{name}-{processes}"

    def _run(self, name: str, processes: int, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
        return run(self._tiny, settings, self.out(name, processes), **more)

    def _runs(self, processes: int) -> list[dict[str, Any]]:
        how = HOWS[processes]
        first = self.out("first", 1)
        stream = {"data.stream": True, "data.tokenizer": str(first / "folded"), "data.vocab_size": 512}
        runs = [
            self._run("stream", processes, {**SHORT, **FOLDED, **stream, **how}),
            self._run("second", processes, {**SHORT, **FOLDED, **how, "seed": 1}, init_from=first),
        ]
        if processes < 4:
            shards = FSDP if processes == 2 else {}
            second = {**TIED, **NO_RESIDUAL, **shards, "seed": 1}
            runs.append(self._run("second-tied", processes, second, init_from=self.out("first-tied", 1)))
        if processes != 2:
            runs += [
                self._run(f"long-{number}", processes, {**(how if processes > 1 else {}), **what})
                for number, (how, what) in enumerate(BY_FOUR)
            ]
        return runs

    def _checkpoint(self) -> tuple[str, dict[str, Any], str]:
        steps = LONG["train.steps"]
        return str(self._tiny), LONG, str(self.out("long-0", 4) / "checkpoints" / f"checkpoint-{steps}")


@pytest.fixture(scope="module")
def done(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    return Done(tiny, tmp_path_factory.mktemp("further"))


@pytest.mark.parametrize("processes", [2, 4])
def test_all_who_split_a_layer_get_the_same_of_a_stream(done: Done, processes: int) -> None:
    one, several = done.out("stream", 1), done.out("stream", processes)
    assert losses(several) == pytest.approx(losses(one), rel=1e-5)
    assert distance(one, several) < 1e-5


@pytest.mark.parametrize(("name", "processes"), [("second-tied", 2), ("second", 2), ("second", 4)])
def test_they_begin_with_the_weights_of_another_run(done: Done, name: str, processes: int) -> None:
    one, several = done.out(name, 1), done.out(name, processes)
    assert losses(several) == pytest.approx(losses(one), rel=1e-5)
    assert distance(one, several) < 1e-5
    assert metrics(several)["val_loss"] == pytest.approx(metrics(one)["val_loss"], rel=1e-5)
    assert metrics(several)["lineage"] == metrics(one)["lineage"]
    assert metrics(several)["lineage"][0].startswith("began with the weights of the run")


@pytest.mark.parametrize("number", range(len(BY_FOUR)))
def test_four_processes_come_to_the_weights_of_one(done: Done, number: int) -> None:
    one, four = (done.out(f"long-{number}", processes) for processes in (1, 4))
    assert len(losses(one)) == 50
    assert losses(four) == pytest.approx(losses(one), rel=1e-5)
    assert distance(one, four) < 1e-5


def test_a_checkpoint_of_four_processes_is_read_by_two_and_one(done: Done) -> None:
    one, four = (done.out("long-0", processes) / "checkpoints" / "checkpoint-50" for processes in (1, 4))
    for name in ("config.json", "generation_config.json", "modeling_lowrank_llama.py", "tokenizer.json"):
        assert (four / name).read_text() == (one / name).read_text()
    by_two, by_one = (torch.load(done.folder / launched / "read.pt") for launched in ("2", "read"))
    weights = load_file(four / "model.safetensors")
    assert all(torch.equal(by_one[name], tensor) for name, tensor in weights.items())
    assert len(by_one) > 2 * len(weights)  # and the optimizer's state
    assert all(torch.equal(by_two[name], tensor) for name, tensor in by_one.items())


def test_each_of_two_shards_holds_about_half(done: Done) -> None:
    (one,) = done.facts[1]
    for facts in done.facts[2]:
        assert facts["bytes"] <= 0.6 * one["bytes"]


@pytest.mark.parametrize(
    ("processes", "way"), [(processes, way) for processes in (2, 4) for way in EXCHANGED[processes]]
)
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
