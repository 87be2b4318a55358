"""Freed memory that glibc keeps for what is allocated next, for training on a CPU."""

import ctypes
import os
import platform

KEEP = {"MALLOC_MMAP_MAX_": (-4, 0), "MALLOC_TRIM_THRESHOLD_": (-1, -1)}
"""From glibc's environment variable to `mallopt`'s parameter (malloc.h) and its value: no block apart from the heap,
and nothing given back from the heap's end (-1 is the largest size)."""


def apply_malloc_settings() -> bool:
    """From now on this process, and those that it starts, keep what they free, as with the variables of `KEEP`.

    As it is set up, glibc gives large tensors back to the kernel when they are freed, and each training step faults
    them in again, page by page. docs/speed.md says how much of its time that takes, and what keeping them costs in
    resident memory.

    Returns:
        Whether it was done: not where another C library is in use, nor where the environment says how memory is to be
        kept (`MALLOC_...` or `GLIBC_TUNABLES`). `MALLOC_MMAP_MAX_=65536` is glibc's own way.
    """
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    for name, (parameter, value) in KEEP.items():
        mallopt(parameter, value)
        os.environ[name] = str(value % 2**64)
    return True
