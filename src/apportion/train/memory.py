"""Keep freed memory at hand while training on a CPU, as torch's allocator does on a GPU.

The C library of Linux gives the end of its heap back to the system whenever much of it is free. What an update holds
only for a while, such as the graph of another model, is then asked for again in the next one, page by page: that was
most of what `PolicyAttention` cost (benchmarks/step.py).
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_THRESHOLD = 32 * 2**20
"""Bytes from which on memory comes from the system each time; glibc takes no larger number."""


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Give no memory back to the system inside; what is free then is given back at the end.

    Nothing is done where the models are not on the CPU, the C library is not glibc, or the environment sets its
    thresholds (`MALLOC_...`, `GLIBC_TUNABLES`). Other allocators (jemalloc, tcmalloc) are not concerned. At the end the
    thresholds are the largest that glibc chooses by itself, and stay there.
    """
    libc = ctypes.CDLL(None)
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if device.type != "cpu" or chosen or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_THRESHOLD)
        libc.malloc_trim(0)
