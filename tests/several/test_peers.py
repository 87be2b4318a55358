"""What a process is told of another that is lost or stalls, wherever it waits for it."""

import os
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from foldrank.train.processes import first_alone, peers_watched, shared_by

from .launch import begun

pytestmark = pytest.mark.apart


def ended(processes: list[BaseProcess], folder: Path) -> list[tuple[str, str]]:
    """What each printed and said, of those that have been waited for."""
    for process in processes:
        process.join(60)
        assert process.exitcode is not None
    return [((folder / f"{rank}.output").read_text(), (folder / f"{rank}.errors").read_text()) for rank in range(2)]


def say(what: object) -> None:
    os.write(1, f"{what}\n".encode())


def exchanges(order: int) -> None:
    """Two at a time, as of the buckets of gradients."""
    processes = shared_by("cpu", patience=1)
    say("ready")
    if not processes.is_main_process:
        time.sleep(600)
    waiting = [dist.all_reduce(torch.ones(100_000), async_op=True) for _ in range(2)]
    for each in waiting[::order]:
        assert each is not None
        try:
            with peers_watched(Path("out")):
                each.wait()
        except ConnectionError as error:
            say(error)


def first(what: str) -> None:
    """The first works alone, dies of it or refuses it."""
    processes = shared_by("cpu", patience=1)
    with peers_watched(), first_alone(processes):
        if processes.is_main_process:
            if what == "dies":
                os._exit(1)
            if what == "refuses":
                raise ValueError("no such text")
            time.sleep(2.5)
    say("through")


@pytest.mark.parametrize("order", [1, -1])
def test_each_exchange_that_waits_in_vain_says_so(order: int, tmp_path: Path) -> None:
    waits, stalls = begun(exchanges, tmp_path, order, processes=2)
    try:
        waits.join(60)
    finally:
        stalls.kill()
    (said, errors), _ = ended([waits, stalls], tmp_path)
    assert waits.exitcode == 0, errors
    ready, *lines = said.splitlines()
    assert ready == "ready"
    assert len(lines) == 2
    assert all(line.startswith("rank 0 of 2 waited in vain for another process") for line in lines)
    assert all(line.endswith("go on with --out out --resume") for line in lines)


def test_work_of_the_first_process_may_take_longer_than_its_patience(tmp_path: Path) -> None:
    processes = begun(first, tmp_path, "works", processes=2)
    assert ended(processes, tmp_path) == [("through\n", "")] * 2
    assert [process.exitcode for process in processes] == [0, 0]


def test_the_others_are_told_that_the_first_ended_before_there_was_a_run(tmp_path: Path) -> None:
    _, (_, errors) = ended(begun(first, tmp_path, "dies", processes=2), tmp_path)
    assert "ConnectionError: rank 1 of 2 lost the connection to another process" in errors
    assert errors.rstrip().endswith("(its own message tells why): start it again")


def test_the_others_do_not_wait_for_a_first_process_that_raised(tmp_path: Path) -> None:
    (_, errors), other = ended(begun(first, tmp_path, "refuses", processes=2), tmp_path)
    assert other == ("through\n", "")
    assert errors.rstrip().endswith("ValueError: no such text")
