"""This benchmark compares the simulation of a schedule with real processes, each of which runs one stage.

The stages sleep for given times, equal or uneven, so that two cores suffice for eight of them; in one more case two
stages compute. Two runs measure what the simulation needs. With one micro-batch in a mini-batch, receivers always wait:
this gives the time that a message takes. Under ``async`` all stages are busy: this gives the times of their operations.
Then every schedule runs, and its time is compared with the simulated time. All runs take turns, and medians over the
turns are compared. It takes six minutes. Usage:

    .venv/bin/python scripts/benchmarks/processes_simulated.py --folder docs/results
"""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from machine import conditions, in_processes, write_measured
from torch import Tensor, nn

from aimc_pl.cost import StageTimes, simulate
from aimc_pl.distributed import Link
from aimc_pl.ghosts import Ghosts
from aimc_pl.passage import Passage, StageProcess
from aimc_pl.pipeline import Pipeline
from aimc_pl.processes import Processes
from aimc_pl.schedule import Operation, Schedule, ScheduleName
from aimc_pl.stage import Stage
from aimc_pl.studies.arguments import at_least_one, study_parser
from aimc_pl.studies.rows import Row, select

SCHEDULES: tuple[ScheduleName, ...] = ("sync", "1f1b", "async")
RUNS: tuple[tuple[str, ScheduleName], ...] = (
    ("latency", "sync"),
    ("times", "async"),
    *(("schedule", name) for name in SCHEDULES),
)
"""The runs of a turn, by what they are for. That for the latency has mini-batches of one micro-batch."""

NUM_MICROBATCHES = 8

SLEEPS = {
    "equal": [(1.0, 1.5, 0.5)],
    "uneven": [(1.0, 1.5, 0.5), (2.0, 2.0, 0.25), (0.5, 3.0, 1.0), (1.5, 1.0, 0.0)],
}
"""For stages 0, 1, … in turn: how long a forward, a backward and an update sleep, in units of ``--seconds``."""


class Case(NamedTuple):
    """A network to run: ``"equal"`` and ``"uneven"`` stages sleep, those of ``"MLP"`` compute."""

    network: str
    num_stages: int


def cases(quick: bool) -> list[Case]:
    """Return the networks and numbers of stages to run."""
    if quick:
        return [Case("uneven", 2)]
    return [Case("MLP", 2), *(Case(network, num_stages) for num_stages in (2, 4, 8) for network in SLEEPS)]


class _Sleep(torch.autograd.Function):
    """Sleep in the forward and in the backward, in place of computing.

    torch declares ``backward`` with any gradients and ``apply`` without a result, against which the checker is told.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        time.sleep(ctx.seconds)
        return error, None, None


class SleepingStage(nn.Module):
    """A stage that returns its input after a while.

    Args:
        forward: how long the forward sleeps, in seconds.
        backward: the same for the backward.
        update: the same for the update.
    """

    def __init__(self, forward: float, backward: float, update: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.sleeps = forward, backward
        self.update_seconds = update

    def forward(self, x: Tensor) -> Tensor:
        """Sleep, and return the input."""
        return _Sleep.apply(x * self.weight, *self.sleeps)  # pyright: ignore[reportReturnType]


class ComputingStage(nn.Sequential):
    """A stage of four layers of 1,024 features."""

    update_seconds = 0.0

    def __init__(self) -> None:
        super().__init__(*(layer for _ in range(4) for layer in (nn.Linear(1024, 1024), nn.ReLU())))


def make(case: Case, seconds: float) -> tuple[nn.Sequential, Tensor]:
    """Return the network, which is a sequence of its stages, and the input of a micro-batch."""
    if case.network == "MLP":
        return nn.Sequential(*(ComputingStage() for _ in range(case.num_stages))), torch.randn(64, 1024)
    sleeps = SLEEPS[case.network]
    stages = [SleepingStage(*(seconds * s for s in sleeps[m % len(sleeps)])) for m in range(case.num_stages)]
    return nn.Sequential(*stages), torch.ones(256)


class TimedLink(Link):
    """A link that knows when the last message arrived."""

    arrival = 0.0

    def receive(self, operation: Operation) -> Any:
        """Receive a message, and note the time."""
        values = super().receive(operation)
        self.arrival = time.monotonic()
        return values


class Timed:
    """A micro-batch whose operations are noted.

    Args:
        passage: the micro-batch.
        note: a function that is called at the end of every operation, with its kind.
    """

    def __init__(self, passage: Passage, note: Callable[[str], None]) -> None:
        self._passage = passage
        self._note = note
        self.abort = passage.abort

    def forward(self, stage: int) -> None:
        """Run and note the forward of the stage."""
        self._passage.forward(stage)
        self._note("F")

    def backward(self, stage: int) -> None:
        """Run and note the backward of the stage."""
        self._passage.backward(stage)
        self._note("B")


def record_run(
    case: Case, processes: Processes, schedule: Schedule, seconds: float, mini_batches: int
) -> list[dict[str, Any]]:
    """Run a schedule, and return when each operation of this process's stage began and ended.

    An operation begins when the one before it has ended and what it needs has arrived, as in a simulation.
    """
    network, x = make(case, seconds)
    layer: Any = network[processes.stage]
    owners = {name: int(name.partition(".")[0]) for name, _ in network.named_parameters()}
    ghosts = Ghosts(network, [*map(str, range(1, case.num_stages))], processes.stage, owners)
    link = TimedLink(processes, torch.device("cpu"))
    own = Stage(processes.stage, layer.parameters())
    process = StageProcess(ghosts, link, own, case.num_stages, delayed=schedule.is_async)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    notes: list[tuple[str, float, float]] = []

    def note(kind: str) -> None:
        before = notes[-1][2] if notes else began
        notes.append((kind, max(before, link.arrival), time.monotonic()))

    def update(stage: Stage) -> None:
        time.sleep(layer.update_seconds)
        optimizer.step()
        optimizer.zero_grad()
        note("U")

    def run(count: int) -> None:
        for _ in range(count):
            passages = [process.microbatch(lambda: network(x).sum(), 1.0, x) for _ in range(schedule.num_microbatches)]
            pipeline.run([Timed(passage, note) for passage in passages])
            if not schedule.is_async:
                update(own)
                pipeline.updated()
        pipeline.drain()

    pipeline, began = Pipeline([own], schedule, update), time.monotonic()
    with ghosts.intercepting():
        run(1)  # the first one also learns what to send
        notes.clear()
        dist.barrier()
        began = time.monotonic()
        run(mini_batches)
    counts = {"F": 0, "B": 0, "U": 0}
    rows = []
    for kind, start, end in notes:
        rows.append({"kind": kind, "microbatch": counts[kind], "start": start, "end": end})
        counts[kind] += 1
    return rows


def record(seconds: float, mini_batches: int, turns: int, networks: Sequence[str]) -> list[Row]:
    """Run all schedules of some networks, and return what this process did. Every process runs this function."""
    processes = Processes(dist.get_world_size(), timeout=120, node=0)
    rows: list[Row] = []
    for network, turn, (what, name) in product(networks, range(turns), RUNS):
        schedule = Schedule(name, processes.num_stages, 1 if what == "latency" else NUM_MICROBATCHES)
        of_run = record_run(Case(network, processes.num_stages), processes, schedule, seconds, mini_batches)
        common = {"network": network, "turn": turn, "run": what, "schedule": name, "stage": processes.stage}
        rows += [{**common, **row} for row in of_run]
    return rows


def latency_of(operations: Sequence[Row]) -> float:
    """Return the median time from the end of an operation to the arrival of its result, where receivers wait."""
    times = {(o["kind"], o["stage"], o["microbatch"]): (o["start"], o["end"]) for o in operations}
    waits = []
    for (kind, stage, k), (_, end) in times.items():
        after = times.get((kind, stage + (1 if kind == "F" else -1), k))
        if kind != "U" and after is not None:
            waits.append(after[0] - end)
    return max(0.0, median(waits))


def times_of(operations: Sequence[Row], stage: int) -> StageTimes:
    """Return the mean times of the operations of a stage."""
    forward, backward, update = (
        fmean(o["end"] - o["start"] for o in select(operations, stage=stage, kind=kind)) for kind in ("F", "B", "U")
    )
    return StageTimes(forward, backward, step=update)


def took_by(operations: Sequence[Row]) -> float:
    """Return the time from the first begin to the last end."""
    return max(o["end"] for o in operations) - min(o["start"] for o in operations)


def compare(operations: Sequence[Row], case: Case, mini_batches: int) -> Iterator[Row]:
    """Yield a row for each schedule: its measured and its simulated time."""
    own = select(operations, network=case.network)
    turns = sorted({o["turn"] for o in own})
    latency = median(latency_of(select(own, run="latency", turn=turn)) for turn in turns)
    stages = [times_of(select(own, run="times"), stage) for stage in range(case.num_stages)]
    for name in SCHEDULES:
        took = median(took_by(select(own, run="schedule", schedule=name, turn=turn)) for turn in turns)
        schedule = Schedule(name, case.num_stages, NUM_MICROBATCHES)
        simulated = simulate(schedule, stages, latency, mini_batches).makespan
        yield {
            "network": case.network,
            "num_stages": case.num_stages,
            "schedule": name,
            "measured_s": round(took, 4),
            "simulated_s": round(simulated, 4),
            "error_percent": round(100 * (simulated / took - 1), 2),
            "latency_ms": round(1e3 * latency, 3),
            "forward_ms": " ".join(f"{1e3 * stage.forward:.2f}" for stage in stages),
            "backward_ms": " ".join(f"{1e3 * stage.backward:.2f}" for stage in stages),
            "update_ms": " ".join(f"{1e3 * stage.step:.2f}" for stage in stages),
        }


def report(rows: Sequence[Row]) -> None:
    """Print a line per case, and the largest error."""
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items() if not key.endswith("_ms")))
    print(f"largest error: {max(abs(row['error_percent']) for row in rows):.2f} %")


def main() -> None:
    """Record the operations, compare them with simulations, write the rows and print the report."""
    parser = study_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=0.02, help="the unit of the times that stages sleep")
    parser.add_argument("--mini-batches", type=at_least_one, default=6, help="the number of mini-batches of a run")
    parser.add_argument("--turns", type=at_least_one, default=3)
    args = parser.parse_args()
    print(conditions(threads=1))
    sizes = (0.004, 2, 1) if args.quick else (args.seconds, args.mini_batches, args.turns)
    rows: list[Row] = []
    all_cases = cases(args.quick)
    for num_stages in sorted({case.num_stages for case in all_cases}):
        own = [case for case in all_cases if case.num_stages == num_stages]
        of_each = in_processes(num_stages, record, *sizes, [case.network for case in own])
        operations = [row for of_one in of_each for row in of_one]
        rows += [row for case in own for row in compare(operations, case, sizes[1])]
    write_measured(args.folder / "processes_simulated.csv", rows)
    report(rows)


if __name__ == "__main__":
    main()
