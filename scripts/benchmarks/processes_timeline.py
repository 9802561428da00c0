"""This benchmark measures the runtime alone: every stage sleeps instead of computing, in a process of its own.

Two cores therefore suffice for eight stages. The benchmark compares the throughput with that of one accelerator that
does all stages, writes when every operation began and ended, and draws these times beside the planned clock table. It
takes two minutes. Usage:

    .venv/bin/python scripts/benchmarks/processes_timeline.py --folder docs/results
"""

import time
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from machine import conditions, in_processes, write_measured
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn

from aimc_pl.diagram import draw_table
from aimc_pl.distributed import Link
from aimc_pl.figures import OPERATIONS, styled
from aimc_pl.ghosts import Ghosts
from aimc_pl.passage import StageProcess
from aimc_pl.pipeline import Pipeline
from aimc_pl.processes import Processes
from aimc_pl.schedule import Schedule
from aimc_pl.stage import Stage
from aimc_pl.studies.arguments import study_parser
from aimc_pl.studies.rows import Row, select, write_rows

PLANS = [("sync", "half"), ("async", "half"), ("async", "full")]
NUM_MICROBATCHES = 8
"""Number of micro-batches in a mini-batch. The synchronous schedule drains after every mini-batch."""

MINI_BATCHES = 6


def cases(quick: bool) -> tuple[int, ...]:
    """Return the numbers of stages to measure."""
    return (2,) if quick else (2, 4, 8)


class _Sleep(torch.autograd.Function):
    """An operation that takes one clock cycle, forward and backward."""

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
    """A stage that returns its input after one clock cycle."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seconds = seconds
        self.times: list[tuple[str, float, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Sleep for one clock cycle and return the input."""
        return _Sleep.apply(x * self.weight, self.seconds, self.times)  # pyright: ignore[reportReturnType]


def record(seconds: float) -> list[Row]:
    """Run all cases and return when each operation of this stage began and ended. Every process runs this function."""
    num_stages = dist.get_world_size()
    processes = Processes(num_stages, timeout=120, node=0)
    stage = processes.stage
    rows: list[Row] = []
    x = torch.ones(256)
    for name, duplex in PLANS:
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
        with ghosts.intercepting():
            for _ in range(MINI_BATCHES):
                pipeline.run([process.microbatch(step, 1.0, x) for _ in range(NUM_MICROBATCHES)])
                if not schedule.is_async:
                    pipeline.updated()
            pipeline.drain()
        counts = {"F": 0, "B": 0}
        for kind, start, end in layers[stage].times:
            case = {"schedule": name, "duplex": duplex, "num_stages": num_stages}
            operation = {"stage": stage, "kind": kind, "microbatch": counts[kind], "start": start, "end": end}
            rows.append(case | operation)
            counts[kind] += 1
    return rows


def summary(operations: Sequence[Row], name: Any, duplex: Any, num_stages: int, seconds: float) -> Row:
    """Return the row of one case.

    The speedup is the number of micro-batches per second times the time that one accelerator needs for a micro-batch.
    The schedule's own speedup stands beside it.
    """
    batches = MINI_BATCHES * NUM_MICROBATCHES
    schedule = Schedule(name, num_stages, NUM_MICROBATCHES, duplex)
    times = [(o["start"], o["end"]) for o in select(operations, schedule=name, duplex=duplex, num_stages=num_stages)]
    took = max(end for _, end in times) - min(start for start, _ in times)
    cycles = schedule.num_cycles(batches) if schedule.is_async else MINI_BATCHES * schedule.num_cycles()
    return {
        "schedule": schedule.name,
        "duplex": schedule.duplex,
        "num_stages": num_stages,
        "planned_speedup": round(2 * num_stages * batches / cycles, 3),
        "speedup": round(2 * num_stages * batches * seconds / took, 3),
        "of_plan": round(cycles * seconds / took, 4),
        "overhead_per_cycle_ms": round(1e3 * (took / cycles - seconds), 3),
        "busy": round(sum(end - start for start, end in times) / took / num_stages, 3),
    }


def report(rows: Sequence[Row]) -> None:
    """Print a line per case."""
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


@styled
def draw(operations: Sequence[Row], num_stages: int, seconds: float, clocks: int = 20) -> Figure:
    """Draw the planned clock tables and, beside each, the times at which the operations ran."""
    figure = Figure(figsize=(10, 2.6 * len(PLANS)), layout="constrained")
    for axes, (name, duplex) in zip(figure.subplots(len(PLANS), 2), PLANS, strict=True):
        schedule = Schedule(name, num_stages, NUM_MICROBATCHES, duplex)  # pyright: ignore[reportArgumentType]
        shown = clocks // schedule.cycles_per_clock
        draw_table(axes[0], schedule, 32 if schedule.is_async else NUM_MICROBATCHES, shown)
        axes[0].set_xticks(range(0, shown + 1, shown // 5))
        axes[0].set_title(f"{name}, {duplex} duplex: the plan")
        mine = select(operations, schedule=name, duplex=duplex, num_stages=num_stages)
        zero = min(o["start"] for o in mine)
        for o in mine:
            start, end = ((o[field] - zero) / seconds for field in ("start", "end"))
            if start < clocks:
                style = {"color": OPERATIONS[o["kind"]], "edgecolor": "white"}
                axes[1].barh(o["stage"], end - start, left=start, **style)
        axes[1].set(
            xlim=(0, clocks), xlabel=f"time in cycles of {1e3 * seconds:g} ms", yticks=range(num_stages), yticklabels=[]
        )
        axes[1].set_xticks(range(0, clocks + 1, clocks // 5))
        axes[1].grid(visible=False)
        axes[1].set_title(f"{name}, {duplex} duplex: {num_stages} processes")
    kinds = {"forward": OPERATIONS["F"], "backward": OPERATIONS["B"]}
    figure.legend(
        handles=[Patch(color=color, label=kind) for kind, color in kinds.items()], loc="outside upper center", ncols=2
    )
    return figure


def main() -> None:
    """Record the operations, write the rows, print the report and draw the figure."""
    parser = study_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=0.05, help="length of a clock cycle in seconds")
    args = parser.parse_args()
    print(conditions(threads=1))
    seconds = 0.005 if args.quick else args.seconds
    sizes = cases(args.quick)
    operations = [row for size in sizes for rows in in_processes(size, record, seconds) for row in rows]
    write_rows(args.folder / "processes_timeline_operations.csv", operations)
    rows = [summary(operations, name, duplex, size, seconds) for (name, duplex), size in product(PLANS, sizes)]
    write_measured(args.folder / "processes_timeline.csv", rows)
    report(rows)
    draw(operations, 2 if args.quick else 4, seconds).savefig(args.folder / "processes_timeline.png", dpi=110)


if __name__ == "__main__":
    main()
