"""Memory that is freed stays at hand while training."""

import ctypes
import subprocess
import sys

import pytest

ROUNDS = """
import ctypes
import resource
from contextlib import nullcontext
import torch
from apportion.train.memory import kept_memory

torch.set_num_threads(1)
for which in (-1, -3):  # as they are in a process that has just begun
    ctypes.CDLL(None).mallopt(which, 2**17)

def resident():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmRSS"].split()[0]) / 2**10

def hold():
    return [torch.zeros(2 * 2**20) for _ in range(32)]  # 8 MiB each

with {context}:
    hold()
    hold()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    hold()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, end=" ")
    inside = resident()
print(inside - resident())
"""


def faults_and_freed(context: str, **environment: str) -> tuple[int, float]:
    """Pages that 256 MiB ask for the third time, and the MiB that are given back at the end."""
    code = ROUNDS.replace("{context}", context)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    faults, freed = done.stdout.split()
    return int(faults), float(freed)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_memory_is_kept_inside_and_given_back_at_the_end() -> None:
    faults, freed = faults_and_freed("kept_memory(torch.device('cpu'))")
    assert faults < 8192  # of 65,536 pages
    assert freed > 200
    assert faults_and_freed("nullcontext()")[0] > 30_000
    assert faults_and_freed("kept_memory(torch.device('meta'))")[0] > 30_000


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_thresholds_of_the_environment_are_left_alone() -> None:
    faults, _ = faults_and_freed("kept_memory(torch.device('cpu'))", MALLOC_TRIM_THRESHOLD_="131072")
    assert faults > 30_000
