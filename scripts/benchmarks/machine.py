"""What the benchmarks share: a quiet machine and steady memory."""

import os
import sys
import time
from pathlib import Path

import torch

STEADY_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}
"""For the environment of a new process: a heap that glibc never gives back."""


def conditions(threads: int) -> str:
    """The processor, torch and its threads, and what else is running, in one line."""
    return f"{processor()}, torch {torch.__version__}, {threads} threads, other load {other_load():.0%}"


def processor() -> str:
    """The processor's name and the widest vector instructions that it has."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    known = {name.strip(): value.strip() for name, _, value in lines}
    flags = known.get("flags", "").split()
    vectors = {"avx512f": "AVX-512", "avx2": "AVX2"}
    widest = next((vectors[flag] for flag in vectors if flag in flags), "no AVX2")
    return f"{known.get('model name', 'processor unknown')} ({widest})"


def other_load(seconds: float = 2.0) -> float:
    """The share of the machine that is busy while this process sleeps."""

    def busy_and_all() -> tuple[int, int]:
        ticks = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks)

    before = busy_and_all()
    time.sleep(seconds)
    after = busy_and_all()
    return (after[0] - before[0]) / (after[1] - before[1])


def keep_freed_memory() -> None:
    """Start anew with a heap that glibc never gives back.

    Otherwise it returns and takes back pages by chance, on both sides, which costs up to a third of a step.
    """
    if not STEADY_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | STEADY_MEMORY)
