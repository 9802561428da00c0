"""Functions that the benchmarks share. They describe the machine beside the results and keep its memory steady."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from aimc_pl.studies.rows import Row, write_rows
from aimc_pl.studies.sweeps import STEADY_MEMORY


def processor() -> str:
    """Return the processor's name and the widest vector instructions that torch uses on it."""
    name = torch.cpu.get_capabilities().get("cpu_name", "processor unknown")
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def conditions(threads: int) -> str:
    """Return the processor, torch's version and threads, and the load of other programs as one line."""
    other_load = psutil.cpu_percent(interval=2.0)
    return f"{processor()}, torch {torch.__version__}, {threads} threads, other load {other_load:.0f}%"


def write_measured(path: Path, rows: Sequence[Row]) -> None:
    """Write rows into a CSV file, each with the name of the processor."""
    write_rows(path, [{**row, "processor": processor()} for row in rows])


def keep_freed_memory() -> None:
    """Restart this program with :data:`STEADY_MEMORY` in its environment, unless it runs with that already."""
    if not STEADY_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | STEADY_MEMORY)
