"""The runtime alone: stages that sleep instead of computing, one process each, so that two cores suffice for eight.

Measures throughput against one stage that does all, writes when every operation began and ended, and draws it beside
the planned table. Two minutes. Usage:

    .venv/bin/python scripts/processes_timeline.py --csv docs/results/processes_timeline.csv \
        --png docs/images/processes_timeline.png
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from tables import write_csv
from torch import Tensor, nn

from aimc_pl.diagram import draw_table
from aimc_pl.distributed import Link
from aimc_pl.ghosts import Ghosts
from aimc_pl.passage import StageProcess
from aimc_pl.pipeline import Pipeline
from aimc_pl.processes import Processes
from aimc_pl.schedule import Schedule
from aimc_pl.stage import Stage

CASES = [("sync", "half"), ("async", "half"), ("async", "full")]
SIZES = (2, 4, 8)
NUM_MICROBATCHES = 8
"""Per mini-batch, of which the synchronous schedule drains after each."""

MINI_BATCHES = 6


class _Sleep(torch.autograd.Function):
    """An operation of one clock cycle, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float, times: list[tuple[str, float, float]]) -> Tensor:
        ctx.rest = seconds, times
        _sleep("F", seconds, times)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _sleep("B", *ctx.rest)
        return error, None, None


def _sleep(kind: str, seconds: float, times: list[tuple[str, float, float]]) -> None:
    start = time.monotonic()
    time.sleep(seconds)
    times.append((kind, start, time.monotonic()))


class SleepingStage(nn.Module):
    """Returns its input after a clock cycle."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seconds = seconds
        self.times: list[tuple[str, float, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Sleep."""
        return _Sleep.apply(x * self.weight, self.seconds, self.times)  # pyright: ignore[reportReturnType]


def record(folder: Path, seconds: float) -> None:
    """In every process: run all cases, and write when each operation of this stage began and ended."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    num_stages = dist.get_world_size()
    processes = Processes(num_stages, timeout=120, node=0)
    stage = processes.stage
    rows, x = [], torch.ones(256)
    for name, duplex in CASES:
        schedule = Schedule(name, num_stages, NUM_MICROBATCHES, duplex)  # pyright: ignore[reportArgumentType]
        layers = [SleepingStage(seconds) for _ in range(num_stages)]
        network = nn.Sequential(*layers)
        owners = {f"{m}.weight": m for m in range(num_stages)}
        ghosts = Ghosts(network, [*map(str, range(1, num_stages))], stage, owners)
        link = Link(processes, torch.device("cpu"))
        own = Stage(stage, layers[stage].parameters())
        process = StageProcess(ghosts, link, own, num_stages, delayed=schedule.is_async)
        pipeline = Pipeline([own], schedule, lambda _: None)
        step = partial(lambda network: network(x).sum(), network)
        dist.barrier()
        for _ in range(MINI_BATCHES):
            pipeline.run([process.microbatch(step, 1.0, x) for _ in range(NUM_MICROBATCHES)])
            if not schedule.is_async:
                pipeline.updated()
        pipeline.drain()
        counts = {"F": 0, "B": 0}
        for kind, start, end in layers[stage].times:
            rows.append((name, duplex, num_stages, stage, kind, counts[kind], start, end))
            counts[kind] += 1
    with (folder / f"{num_stages}-{stage}.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def launch(num_stages: int, seconds: float) -> Iterator[dict[str, Any]]:
    """The operations of all processes."""
    with tempfile.TemporaryDirectory() as folder:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_stages}"]
        command = [*torchrun, __file__, "--record", folder, "--seconds", str(seconds)]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        for path in sorted(Path(folder).glob("*.csv")):
            for row in csv.reader(path.open()):
                yield {
                    "schedule": row[0],
                    "duplex": row[1],
                    "num_stages": int(row[2]),
                    "stage": int(row[3]),
                    "kind": row[4],
                    "microbatch": int(row[5]),
                    "start": float(row[6]),
                    "end": float(row[7]),
                }


def summary(operations: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Of one case: micro-batches per second times what one accelerator needs for one, and the plan's."""
    first = operations[0]
    num_stages, batches = first["num_stages"], MINI_BATCHES * NUM_MICROBATCHES
    schedule = Schedule(first["schedule"], num_stages, NUM_MICROBATCHES, first["duplex"])
    took = max(o["end"] for o in operations) - min(o["start"] for o in operations)
    cycles = schedule.num_cycles(batches) if schedule.is_async else MINI_BATCHES * schedule.num_cycles()
    return {
        "schedule": schedule.name,
        "duplex": schedule.duplex,
        "num_stages": num_stages,
        "planned_speedup": round(2 * num_stages * batches / cycles, 3),
        "speedup": round(2 * num_stages * batches * seconds / took, 3),
        "of_plan": round(cycles * seconds / took, 4),
        "overhead_per_cycle_ms": round(1e3 * (took / cycles - seconds), 3),
        "busy": round(sum(o["end"] - o["start"] for o in operations) / took / num_stages, 3),
    }


def draw(operations: list[dict[str, Any]], seconds: float, clocks: int = 30) -> Figure:
    """For 4 stages, the planned tables and, below each, the times at which operations ran."""
    figure = Figure(figsize=(14, 3.0 * len(CASES)), layout="constrained")
    for axes, (name, duplex) in zip(figure.subplots(len(CASES), 2), CASES, strict=True):
        schedule = Schedule(name, 4, NUM_MICROBATCHES, duplex)  # pyright: ignore[reportArgumentType]
        shown = clocks // schedule.cycles_per_clock
        draw_table(axes[0], schedule, 32 if schedule.is_async else NUM_MICROBATCHES, shown)
        axes[0].set_title(f"{name}, {duplex} duplex: the plan")
        mine = [o for o in operations if (o["schedule"], o["duplex"], o["num_stages"]) == (name, duplex, 4)]
        zero = min(o["start"] for o in mine)
        for o in mine:
            start = (o["start"] - zero) / seconds
            if start < clocks:
                colour = "tab:blue" if o["kind"] == "F" else "tab:orange"
                axes[1].barh(o["stage"], (o["end"] - o["start"]) / seconds, left=start, color=colour, edgecolor="white")
        axes[1].set(xlim=(0, clocks), xlabel=f"time in cycles of {1e3 * seconds:g} ms", ylabel="stage", yticks=range(4))
        axes[1].set_title(f"{name}, {duplex} duplex: four processes")
    return figure


def main() -> None:
    """Record, summarize, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="the summary; every operation goes to a file beside it, …_operations")
    parser.add_argument("--png", type=Path)
    parser.add_argument("--seconds", type=float, default=0.05, help="one clock cycle")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.record:
        record(args.record, args.seconds)
        return
    operations = [operation for size in SIZES for operation in launch(size, args.seconds)]
    write_csv(args.csv.with_stem(f"{args.csv.stem}_operations"), operations)
    rows = [
        summary(
            [o for o in operations if (o["schedule"], o["duplex"], o["num_stages"]) == (name, duplex, size)],
            args.seconds,
        )
        for name, duplex in CASES
        for size in SIZES
    ]
    write_csv(args.csv, rows)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    args.png.parent.mkdir(parents=True, exist_ok=True)
    draw(operations, args.seconds).savefig(args.png, dpi=110)


if __name__ == "__main__":
    main()
