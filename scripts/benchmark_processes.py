"""Two processes with a stage each against one process with both, and against torch's own pipeline schedules.

Every process computes on one thread, and both sides update equally often. They take turns in one run; the medians of
the turns are compared. Seven minutes on two cores. Usage:

    .venv/bin/python scripts/benchmark_processes.py --csv docs/results/benchmark_processes.csv
"""

import argparse
import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from aihwkit.optim import AnalogSGD
from benchmarking import keep_freed_memory, other_load
from tables import write_csv
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional as F

from aimc_pl.devices import convert_to_analog, soft_bounds_reference
from aimc_pl.distributed import Link, rank_of
from aimc_pl.models import ResNet
from aimc_pl.partition import partition
from aimc_pl.pipeline import Pipeline
from aimc_pl.schedule import Operation, Schedule, ScheduleName
from aimc_pl.stage import Stage

NUM_STAGES, NUM_MICROBATCHES = 2, 8


def mlp() -> nn.Module:
    """Eight layers of 1,024."""
    return nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(1024, 1024), nn.ReLU())))


def analog_resnet(depth: int) -> nn.Module:
    """On aihwkit's pulse-level tiles."""
    network = ResNet(depth)
    convert_to_analog(network, soft_bounds_reference(backend="aihwkit"))
    return network


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Sequence[str], int]] = {
    "MLP 8x1024, micro-batch 64": (mlp, (64, 1024), ["8"], 8),
    "ResNet-32, micro-batch 32": (lambda: ResNet(32), (32, 3, 32, 32), [], 3),
    "ResNet-8 on aihwkit, micro-batch 8": (lambda: analog_resnet(8), (8, 3, 32, 32), [], 2),
    "ResNet-20 on aihwkit, micro-batch 8": (lambda: analog_resnet(20), (8, 3, 32, 32), [], 1),
}
"""Network, one micro-batch, where to split (measured if it is not said), mini-batches of a turn."""


class TimedLink(Link):
    """Knows how long its process has waited, in seconds."""

    waited = 0.0

    def receive(self, operation: Operation) -> Any:
        """Wait for what a neighbour has sent."""
        start = time.perf_counter()
        values = super().receive(operation)
        self.waited += time.perf_counter() - start
        return values


class MicroBatch:
    """The same samples again and again."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def enter(self) -> tuple[Tensor]:
        """The samples."""
        return (self.x,)

    def leave(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Their loss and its weight."""
        loss = F.cross_entropy(outputs, self.y)
        return loss, torch.full_like(loss, 1 / NUM_MICROBATCHES)

    def entered(self, gradients: Any) -> None:
        """Nothing comes before the pipeline."""


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    """A step that also pulses tiles."""
    return AnalogSGD(module.parameters(), lr=0.01)


def ours(
    name: ScheduleName, parts: Sequence[nn.Module], micro: MicroBatch, alone: bool
) -> tuple[Callable[[], None], TimedLink | None]:
    """One mini-batch through our pipeline, in this process alone or in all; and the link between them."""
    schedule = Schedule(name, NUM_STAGES, NUM_MICROBATCHES)
    rank = rank_of(dist.get_rank(), NUM_STAGES)
    stages = [Stage(i, parts[i], delayed=schedule.is_async) for i in (range(NUM_STAGES) if alone else [rank])]
    optimizers = {stage.index: sgd(stage.module) for stage in stages}

    def update(stage: Stage) -> None:
        optimizers[stage.index].step()
        optimizers[stage.index].zero_grad()

    link = None if alone else TimedLink(rank, NUM_STAGES, torch.device("cpu"), lambda _: True, 60)
    pipeline = Pipeline(stages, schedule, update, transport=link)

    def run() -> None:
        pipeline.run([micro] * NUM_MICROBATCHES)
        if not schedule.is_async:
            for stage in stages:
                update(stage)
            pipeline.updated()

    return run, link


def torchs(kind: Any, parts: Sequence[nn.Module], micro: MicroBatch) -> Callable[[], None]:
    """One mini-batch through a schedule of torch.distributed.pipelining."""
    rank = dist.get_rank()
    part = parts[rank]
    schedule = kind(
        PipelineStage(part, rank, NUM_STAGES, torch.device("cpu")), NUM_MICROBATCHES, loss_fn=F.cross_entropy
    )
    optimizer = sgd(part)
    x, y = (torch.cat([value] * NUM_MICROBATCHES) for value in (micro.x, micro.y))

    def run() -> None:
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y)
        optimizer.step()
        optimizer.zero_grad()

    return run


def turn(run: Callable[[], None], mini_batches: int, everyone: bool) -> float:
    """Milliseconds per micro-batch."""
    dist.barrier()
    start = time.perf_counter()
    if everyone or dist.get_rank() == 0:
        for _ in range(mini_batches):
            run()
    dist.barrier()
    return 1e3 * (time.perf_counter() - start) / mini_batches / NUM_MICROBATCHES


def measure(csv: Path, turns: int) -> None:
    """In every process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    rows: list[dict[str, Any]] = []
    for case, (make, shape, split_at, mini_batches) in CASES.items():
        torch.manual_seed(0)
        network = make()
        x, y = torch.randn(shape), torch.randint(10, shape[:1])
        chosen: list[Any] = [split_at or partition(copy.deepcopy(network), NUM_STAGES, (x,)).split_at]
        dist.broadcast_object_list(chosen)
        micro = MicroBatch(x, y)

        def parts(network: nn.Module = network, chosen: Sequence[str] = chosen[0], x: Tensor = x) -> Any:
            return partition(copy.deepcopy(network), NUM_STAGES, (x,), split_at=chosen).stages

        sides: dict[str, Callable[[], None]] = {}
        links: dict[str, TimedLink] = {}
        for name in ("async", "sync"):
            sides[f"one process, {name}"], _ = ours(name, parts(), micro, alone=True)
            sides[f"two processes, {name}"], link = ours(name, parts(), micro, alone=False)
            links |= {f"two processes, {name}": link} if link else {}
        if "aihwkit" not in case:
            # torch infers shapes by a backward, which would leave pulses behind in tiles.
            for kind in (ScheduleGPipe, Schedule1F1B):
                sides[f"torch {kind.__name__}"] = torchs(kind, parts(), micro)
        times: dict[str, list[float]] = {side: [] for side in sides}
        busy: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(turns + 1):
            for side, run in sides.items():
                before = links[side].waited if side in links else 0.0
                took = turn(run, mini_batches, everyone=not side.startswith("one"))
                if number:
                    waited = links[side].waited - before if side in links else 0.0
                    times[side].append(took)
                    busy[side].append(took - 1e3 * waited / mini_batches / NUM_MICROBATCHES)
        for side, values in times.items():
            name = "async" if side.endswith("async") else "sync"
            busiest = [0.0] * NUM_STAGES
            dist.all_gather_object(busiest, median(busy[side]))
            speedup = median(times[f"one process, {name}"]) / median(values)
            rows.append(
                {
                    "case": case,
                    "side": side,
                    "ms_per_microbatch": round(median(values), 2),
                    "fastest": round(min(values), 2),
                    "slowest": round(max(values), 2),
                    "speedup": round(speedup, 3),
                    "busiest_process_ms": round(max(busiest), 2) if side in links else "",
                    "split_at": " ".join(chosen[0]),
                }
            )
            if dist.get_rank() == 0:
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if dist.get_rank() == 0:
        write_csv(csv, rows)
    dist.barrier()


def main() -> None:
    """Start the processes, and measure in them."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=9)
    args = parser.parse_args()
    if "RANK" in os.environ:
        measure(args.csv, args.turns)
        return
    print(f"torch {torch.__version__}, one thread per process, other load {other_load():.0%}", flush=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_STAGES}"]
    subprocess.run([*launch, *sys.argv], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


if __name__ == "__main__":
    main()
