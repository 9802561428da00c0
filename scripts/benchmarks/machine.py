"""Functions that the benchmarks share.

They describe the machine beside the results, keep its memory steady and start processes.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

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


def in_processes[T](num_processes: int, function: Callable[..., T], *args: Any, timeout: float = 120.0) -> list[T]:
    """Call a function in each process of a new process group. Return the results in the order of ranks.

    The processes are copies of this one, so that modules are imported once. Each computes on one thread.

    Args:
        num_processes: number of processes in the group.
        function: what every process calls.
        args: the function's arguments.
        timeout: seconds that a process waits for another one.
    """
    with tempfile.TemporaryDirectory() as folder:
        of_each = (num_processes, timeout, Path(folder), function, args)
        start_processes(_call_as_rank, of_each, num_processes, start_method="fork")
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(num_processes)]


def _call_as_rank(
    rank: int, world_size: int, timeout: float, folder: Path, function: Callable[..., Any], args: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/group", timedelta(seconds=timeout), rank=rank, world_size=world_size
    )
    torch.save(function(*args), folder / str(rank))
    dist.barrier()  # no process leaves while another one still talks to it
    dist.destroy_process_group()
