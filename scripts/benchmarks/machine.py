"""What the benchmarks share: the machine they run on, written beside their numbers, and steady memory."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from aimc_pl.studies.rows import Row, write_rows
from aimc_pl.studies.sweeps import STEADY_MEMORY


def processor() -> str:
    """The processor's name and the widest vector instructions that torch uses on it."""
    name = torch.cpu.get_capabilities().get("cpu_name", "processor unknown")
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def conditions(threads: int) -> str:
    """The processor, torch and its threads, and what else is running, in one line."""
    other_load = psutil.cpu_percent(interval=2.0)
    return f"{processor()}, torch {torch.__version__}, {threads} threads, other load {other_load:.0f}%"


def write_measured(path: Path, rows: Sequence[Row]) -> None:
    """Write rows into a CSV file, each with the processor."""
    write_rows(path, [{**row, "processor": processor()} for row in rows])


def keep_freed_memory() -> None:
    """Start anew with steady memory, if this process has none."""
    if not STEADY_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | STEADY_MEMORY)
