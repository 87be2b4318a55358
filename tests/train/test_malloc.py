"""Freed memory is kept where nobody asked for something else."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from foldrank.train.malloc import apply_malloc_settings

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(apply_malloc_settings(), min(faults() for _ in range(30)))
"""


def kept_and_fewest_faults(**environment: str) -> tuple[bool, int]:
    """Whether freed memory is kept, and how many pages a tensor of 64 MiB was faulted in with, the best of 30 times."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | environment, check=True, capture_output=True, text=True
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.usefixtures("usual_memory")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no mallopt")
def test_a_freed_tensor_is_faulted_in_again_only_where_the_environment_says_so() -> None:
    kept, faults = kept_and_fewest_faults()
    left, faults_of_glibc = kept_and_fewest_faults(MALLOC_MMAP_MAX_="65536")
    assert (kept, left) == (True, False)
    assert faults < faults_of_glibc / 10
