"""What a process is told of another that is lost or stalls, wherever it waits for it."""

import os
import subprocess
import sys
import time

import pytest

from tests.train.test_faults import free_port

pytestmark = pytest.mark.apart

TWO = """
import os, sys, time
from pathlib import Path

import torch
import torch.distributed as dist

from foldrank.train.processes import first_alone, peers_watched, shared_by

os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=sys.argv[2], WORLD_SIZE="2", RANK=sys.argv[1], LOCAL_RANK="0")
processes = shared_by("cpu", patience=1)
if sys.argv[3] == "first":
    with peers_watched(), first_alone(processes):
        if processes.is_main_process:
            if sys.argv[4] == "dies":
                os._exit(1)
            if sys.argv[4] == "refuses":
                raise ValueError("no such text")
            time.sleep(float(sys.argv[4]))
    print("through", flush=True)
else:
    print("ready", flush=True)
    if not processes.is_main_process:
        time.sleep(600)
    # Two exchanges at a time, as of the buckets of gradients.
    waiting = [dist.all_reduce(torch.ones(100_000), async_op=True) for _ in range(2)]
    for each in waiting[:: int(sys.argv[4])]:
        try:
            with peers_watched(Path("out")):
                each.wait()
        except ConnectionError as error:
            print(error, flush=True)
"""


def two(*arguments: str) -> list[subprocess.Popen[str]]:
    port = str(free_port())
    command = [sys.executable, "-c", TWO]
    return [
        subprocess.Popen(
            [*command, str(rank), port, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize("order", ["1", "-1"])
def test_each_exchange_that_waits_in_vain_says_so(order: str) -> None:
    first, second = two("stalls", order)
    try:
        said, errors = first.communicate(timeout=60)
    finally:
        second.kill()
        second.communicate()
    assert first.returncode == 0, errors
    ready, *lines = said.splitlines()
    assert ready == "ready"
    assert len(lines) == 2
    assert all(line.startswith("rank 0 of 2 waited in vain for another process") for line in lines)
    assert all(line.endswith("go on with --out out --resume") for line in lines)


def test_work_of_the_first_process_may_take_longer_than_its_patience() -> None:
    began = time.monotonic()
    for each in two("first", "3"):
        assert each.communicate(timeout=60) == ("through\n", ""), each.args
        assert each.returncode == 0
    assert time.monotonic() - began > 3


def test_the_others_are_told_that_the_first_ended_before_there_was_a_run() -> None:
    first, second = two("first", "dies")
    first.communicate(timeout=60)
    _, errors = second.communicate(timeout=60)
    assert "ConnectionError: rank 1 of 2 lost the connection to another process" in errors
    assert errors.rstrip().endswith("(its own message tells why): start it again")


def test_the_others_do_not_wait_for_a_first_process_that_raised() -> None:
    first, second = two("first", "refuses")
    assert second.communicate(timeout=60) == ("through\n", "")
    assert first.communicate(timeout=60)[1].rstrip().endswith("ValueError: no such text")
