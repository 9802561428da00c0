"""This benchmark compares two processes with a stage each with one process and with torch's own pipeline schedules.

Every process computes on one thread. All sides run the same stages and take turns in one run, and medians over the
turns are compared. The speedup is that over one process that updates as often. Usage:

    .venv/bin/python scripts/benchmarks/processes.py --folder docs/results

Columns: ``own_ms`` is the time of the slowest stage by itself (forward, backward and update) in an undivided run
without any pipeline. The other process does the same at the same time, since busy cores share their memory.
``efficiency`` is ``own_ms`` divided by the time that two processes take; under ``sync`` only the share of that time
counts in which the schedule gives a stage work. ``elsewhere_percent`` is the share of a process's time, without sending
and waiting, that does not go into its own stage: the process also runs through the code of the other stages and keeps
track of the values that it meets there.
"""

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from aihwkit.optim import AnalogSGD
from machine import conditions, in_processes, keep_freed_memory, write_measured
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, SplitPoint, pipeline
from torch.nn import functional as F

from aimc_pl import boundaries
from aimc_pl.boundaries import Calls
from aimc_pl.devices import convert_to_analog, soft_bounds_reference
from aimc_pl.distributed import Link
from aimc_pl.flight import Flight, StagedStep
from aimc_pl.ghosts import Ghosts
from aimc_pl.models import GPT, ResNet
from aimc_pl.passage import StageProcess
from aimc_pl.pipeline import Pipeline
from aimc_pl.processes import Processes
from aimc_pl.schedule import Schedule, ScheduleName
from aimc_pl.stage import Stage
from aimc_pl.strategies.ownership import Ownership
from aimc_pl.studies.arguments import at_least_one, study_parser
from aimc_pl.studies.rows import Row
from aimc_pl.trial import Trials

NUM_STAGES, NUM_MICROBATCHES = 2, 8
SCHEDULES: tuple[ScheduleName, ...] = ("async", "sync")
CPU = torch.device("cpu")
TIMEOUT = 600.0
"""Seconds to wait for the other process."""


def mlp() -> nn.Module:
    """Return an MLP of eight layers of 1,024 features."""
    return nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(1024, 1024), nn.ReLU())))


def gpt() -> nn.Module:
    """Return a GPT of twelve layers, 256 wide."""
    return GPT(vocab_size=256, num_layers=12, width=256, num_heads=8, context=128)


def analog_resnet(depth: int) -> nn.Module:
    """Return a ResNet on aihwkit's pulse-level tiles."""
    network = ResNet(depth)
    convert_to_analog(network, soft_bounds_reference(backend="aihwkit"))
    return network


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Sequence[str], int]] = {
    "MLP 8x1024, micro-batch 64": (mlp, (64, 1024), ["8"], 8),
    "ResNet-32, micro-batch 32": (lambda: ResNet(32), (32, 3, 32, 32), [], 3),
    "GPT 12x256, micro-batch 4x128": (gpt, (4, 128), ["blocks.6"], 1),
    "ResNet-8 on aihwkit, micro-batch 8": (lambda: analog_resnet(8), (8, 3, 32, 32), [], 2),
    "ResNet-20 on aihwkit, micro-batch 8": (lambda: analog_resnet(20), (8, 3, 32, 32), [], 1),
}
"""By name: the network, the shape of a micro-batch, the module with which the second stage begins (if empty, the
boundary is found by measuring), and the number of mini-batches in a turn.
"""


def cases(quick: bool, only: str = "") -> list[str]:
    """Return the networks whose names contain ``only``. A quick run takes the first network."""
    return [*NETWORKS][:1] if quick else [name for name in NETWORKS if only in name]


class MicroBatch:
    """The same samples in every step.

    Args:
        network: decides between tokens (for a :class:`GPT`) and images or features.
        shape: of the images, features or tokens of one micro-batch.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        is_text = isinstance(network, GPT)
        self.x = torch.randint(256, shape) if is_text else torch.randn(shape)
        self.y = torch.randint(256, shape) if is_text else torch.randint(10, shape[:1])

    def step(self, network: nn.Module) -> Callable[[], Tensor]:
        """Return a training step of the network on these samples."""
        return lambda: loss_of(network(self.x), self.y)


def loss_of(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy, a mean over samples or over tokens."""
    return F.cross_entropy(outputs.flatten(0, -2), y.flatten())


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return an optimizer that also sends pulses to analog tiles."""
    return AnalogSGD([*parameters], lr=0.01)


def find_boundaries(network: nn.Module, micro: MicroBatch) -> list[str]:
    """Return the module with which the second stage begins, as the first process has measured it."""
    trials = Trials(network, [micro.step(network)], (micro.x, micro.y))
    calls = Calls()
    trials.undivided(calls.recorded(network))
    found = boundaries.find(trials, calls, NUM_STAGES, may_share=False, repeats=3)[0]
    return Processes(NUM_STAGES, TIMEOUT, node=0).gather(found)[0]


def staged(network: nn.Module, split_at: Sequence[str], micro: MicroBatch, delayed: bool = True) -> StagedStep:
    """Return the training step in stages, after a recording that finds the parameters of each stage."""
    stages = [Stage(index) for index in range(NUM_STAGES)]
    step = StagedStep(network, split_at, stages, delayed=delayed, may_share=False)
    Trials(network, [micro.step(network)], (micro.x, micro.y)).record(step)
    return step


def updates(stages: Sequence[Stage]) -> Callable[[Stage], None]:
    """Return a function that updates a stage and clears its gradients."""
    optimizers = {stage.index: sgd(stage.parameters) for stage in stages}

    def update(stage: Stage) -> None:
        optimizers[stage.index].step()
        optimizers[stage.index].zero_grad()

    return update


def one_process(
    name: ScheduleName, network: nn.Module, split_at: Sequence[str], micro: MicroBatch
) -> Callable[[], None]:
    """Return a function that runs one mini-batch through both stages in this process."""
    step = staged(network, split_at, micro, delayed=name == "async")
    update, function = updates(step.stages), micro.step(network)
    pipeline = Pipeline(step.stages, Schedule(name, NUM_STAGES, NUM_MICROBATCHES), update)

    def run() -> None:
        with step.running():
            pipeline.run([Flight(step, function, 1 / NUM_MICROBATCHES) for _ in range(NUM_MICROBATCHES)])
        finish(pipeline, update)

    return run


def two_processes(
    name: ScheduleName, network: nn.Module, split_at: Sequence[str], micro: MicroBatch
) -> Callable[[], None]:
    """Return a function that runs one mini-batch through the stage of this process."""
    step = staged(network, split_at, micro)
    processes = Processes(NUM_STAGES, TIMEOUT, node=0)
    own = step.stages[processes.stage]
    ghosts = Ghosts(network, split_at, own.index, Ownership(network, step.stages).owners)
    process = StageProcess(ghosts, Link(processes, CPU), own, NUM_STAGES, delayed=name == "async")
    update, function, inputs = updates([own]), micro.step(network), (micro.x, micro.y)
    pipeline = Pipeline([own], Schedule(name, NUM_STAGES, NUM_MICROBATCHES), update)
    ghosts.free()

    def run() -> None:
        with ghosts.intercepting():
            pipeline.run([process.microbatch(function, 1 / NUM_MICROBATCHES, inputs) for _ in range(NUM_MICROBATCHES)])
        finish(pipeline, update)

    return run


def finish(pipeline: Pipeline, update: Callable[[Stage], None]) -> None:
    """Update the stages once for the mini-batch, unless the schedule has updated them after every micro-batch."""
    if not pipeline.schedule.is_async:
        for stage in pipeline.stages:
            update(stage)
        pipeline.updated()


def torchs(kind: Any, network: nn.Module, split_at: Sequence[str], micro: MicroBatch) -> Callable[[], None]:
    """Return a function that runs one mini-batch through a schedule of torch.distributed.pipelining."""
    rank = dist.get_rank()
    pipe = pipeline(network, (micro.x,), split_spec=dict.fromkeys(split_at, SplitPoint.BEGINNING))
    stage = pipe.build_stage(rank, CPU)
    schedule = kind(stage, NUM_MICROBATCHES, loss_fn=loss_of)
    optimizer = sgd(stage.submod.parameters())
    x, y = (torch.cat([value] * NUM_MICROBATCHES) for value in (micro.x, micro.y))

    def run() -> None:
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y)
        optimizer.step()
        optimizer.zero_grad()

    return run


def plain_pass(network: nn.Module, split_at: Sequence[str], micro: MicroBatch) -> Callable[[], list[float]]:
    """Return a function that runs a plain forward and backward of one micro-batch and returns each stage's seconds.

    The forward of a stage begins when its first module is called. Its backward ends when the gradient reaches that
    module's input.
    """
    function, times = micro.step(network), list[float]()

    def note(*_: Any) -> None:
        times.append(time.thread_time())

    def begin(module: nn.Module, args: Any) -> None:
        note()
        args[0].register_hook(note)

    def run() -> list[float]:
        times.clear()
        handles = [network.get_submodule(name).register_forward_pre_hook(begin) for name in split_at]
        note()
        loss = function()
        note()
        loss.backward()
        note()
        for handle in handles:
            handle.remove()
        taken = [end - start for start, end in pairwise(times)]
        return [taken[stage] + taken[-1 - stage] for stage in range(NUM_STAGES)]

    return run


def ghosts_pass(network: nn.Module, step: StagedStep, micro: MicroBatch) -> Callable[[], list[float]]:
    """Return a function that runs one micro-batch through the processes' code and returns each stage's seconds.

    The stages run one after the other in this process, and nothing is sent.
    """
    owners = Ownership(network, step.stages).owners
    processes = [Ghosts(network, step.boundaries, index, owners) for index in range(NUM_STAGES)]
    function, inputs = micro.step(network), (micro.x, micro.y)

    def run() -> list[float]:
        flights, message, seconds = [], None, [0.0] * NUM_STAGES
        for index, process in enumerate(processes):
            with process.intercepting():  # not timed: a process enters it once per mini-batch
                start = time.thread_time()
                flight = process.forward(function, message, 0, inputs)
                seconds[index] += time.thread_time() - start
            message = _as_received(flight.outgoing)
            flights.append(flight)
        weight = torch.ones_like(flights[-1].result)
        for index in reversed(range(NUM_STAGES)):
            start = time.thread_time()
            back = processes[index].backward(flights[index], message, None if message else weight)
            seconds[index] += time.thread_time() - start
            message = _as_received(back)
        return seconds

    return run


def _as_received(message: Any) -> Any:
    """Return a message as its receiver has it, with tensors of its own."""
    if message is None:
        return None
    texts, keys, tensors = message
    return texts, keys, tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors)


class Alone:
    """A measurement of each stage by itself, in seconds of processor time.

    Args:
        passes: functions that run a micro-batch forward and backward, undivided and as the processes do it. They take
            turns, and each returns the seconds of every stage.
        stages: to update.
    """

    def __init__(self, passes: Sequence[Callable[[], list[float]]], stages: Sequence[Stage]) -> None:
        self._passes = passes
        self._stages = stages
        self._update = updates(stages)
        self._seconds: list[list[list[float]]] = []

    def turn(self, microbatches: int) -> None:
        """Run and time all passes and the updates for this many micro-batches."""
        for _ in range(microbatches):
            update, seconds = [], list[list[float]]()
            for once in self._passes:
                seconds.append(once())
                update = [self._time_update(stage) for stage in self._stages]  # clears the gradients
            self._seconds.append([update, *seconds])

    def _time_update(self, stage: Stage) -> float:
        start = time.thread_time()
        self._update(stage)
        return time.thread_time() - start

    def milliseconds(self, warm_up: int) -> list[list[float]]:
        """Return medians after the warm-up: of the update and of each pass, for every stage in its own process."""
        stage = Processes(NUM_STAGES, TIMEOUT, node=0).stage
        mine = [1e3 * median(row[stage] for row in rows) for rows in zip(*self._seconds[warm_up:], strict=True)]
        everyones: list[Any] = [None] * NUM_STAGES
        dist.all_gather_object(everyones, (stage, mine))
        return [[*taken] for taken in zip(*(taken for _, taken in sorted(everyones)), strict=True)]


def turn(run: Callable[[], None], mini_batches: int, everyone: bool) -> float:
    """Return the milliseconds per micro-batch of one turn."""
    dist.barrier()
    start = time.perf_counter()
    if everyone or dist.get_rank() == 0:
        for _ in range(mini_batches):
            run()
    dist.barrier()
    return 1e3 * (time.perf_counter() - start) / mini_batches / NUM_MICROBATCHES


def sides_of(
    network: nn.Module, split_at: Sequence[str], micro: MicroBatch
) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """Return the sides to compare, each with its own copy of the network, and why other sides are missing."""
    sides: dict[str, Callable[[], None]] = {}
    missing: dict[str, str] = {}
    for name in SCHEDULES:
        sides[f"one process, {name}"] = one_process(name, copy.deepcopy(network), split_at, micro)
        sides[f"two processes, {name}"] = two_processes(name, copy.deepcopy(network), split_at, micro)
    for kind in (ScheduleGPipe, Schedule1F1B):
        try:
            sides[f"torch {kind.__name__}"] = torchs(kind, copy.deepcopy(network), split_at, micro)
        except Exception as error:
            missing[f"torch {kind.__name__}"] = f"torch cannot trace it: {type(error).__name__}"
    return sides, missing


def run(case: str, turns: int, divisor: int = 1) -> list[dict[str, Any]]:
    """Measure one network, in every process, and return a row per side. Only rank 0 returns rows."""
    make, shape, given, mini_batches = NETWORKS[case]
    mini_batches = max(mini_batches // divisor, 1)
    torch.manual_seed(0)
    network = make()
    micro = MicroBatch(network, shape)
    split_at = given or find_boundaries(network, micro)
    sides, missing = sides_of(network, split_at, micro)
    step = staged(network, split_at, micro)
    alone = Alone([plain_pass(network, split_at, micro), ghosts_pass(network, step, micro)], step.stages)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(turns + 1):
        for side, once in sides.items():
            took = turn(once, mini_batches, everyone=not side.startswith("one"))
            if number:
                times[side].append(took)
        dist.barrier()
        alone.turn(mini_batches * NUM_MICROBATCHES)
    own = alone.milliseconds(mini_batches * NUM_MICROBATCHES)
    if dist.get_rank():
        return []
    rows = [row(case, side, times, own, split_at) for side in sides]
    return rows + [dict.fromkeys(rows[0], "") | {"case": case, "side": side, "note": missing[side]} for side in missing]


def row(
    case: str,
    side: str,
    times: dict[str, list[float]],
    own: list[list[float]],
    split_at: Sequence[str],
) -> dict[str, Any]:
    """Return the row of one side."""
    name: ScheduleName = "async" if side.endswith("async") else "sync"
    schedule = Schedule(name, NUM_STAGES, NUM_MICROBATCHES)
    took = median(times[side])
    update, *passes = own
    share = 1 if schedule.is_async else 1 / NUM_MICROBATCHES
    plain, ghosts = ([a + share * b for a, b in zip(taken, update, strict=True)] for taken in passes)
    # An asynchronous pipeline stays full from one turn to the next, so no cycles are lost.
    idle = 1 if schedule.is_async else schedule.num_cycles() / (2 * NUM_MICROBATCHES)
    found = {
        "case": case,
        "side": side,
        "ms_per_microbatch": round(took, 2),
        "fastest": round(min(times[side]), 2),
        "slowest": round(max(times[side]), 2),
        "speedup": round(median(times[f"one process, {name}"]) / took, 3),
        "own_ms": "",
        "efficiency": "",
        "elsewhere_percent": "",
        "split_at": " ".join(split_at),
        "note": "",
    }
    if side.startswith("two"):
        elsewhere = max(100 * (1 - bare / whole) for bare, whole in zip(plain, ghosts, strict=True))
        found |= {
            "own_ms": round(max(plain), 2),
            "efficiency": round(idle * max(plain) / took, 3),
            "elsewhere_percent": round(elsewhere, 1),
        }
    return found


def report(rows: Sequence[Row]) -> None:
    """Print a line per side."""
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)


def measure(turns: int, only: str, quick: bool) -> list[dict[str, Any]]:
    """Measure all networks. Every process runs this function. Only rank 0 returns rows."""
    rows: list[dict[str, Any]] = []
    for case in cases(quick, only):
        of_case = run(case, 1, divisor=8) if quick else run(case, turns)
        report(of_case)
        rows += of_case
    return rows


def main() -> None:
    """Start the processes, which measure and print the report, and write the rows."""
    parser = study_parser(__doc__)
    parser.add_argument("--turns", type=at_least_one, default=9)
    parser.add_argument("--only", default="", help="measure only the networks whose names contain this text")
    args = parser.parse_args()
    if not args.quick:
        keep_freed_memory()
    print(conditions(threads=1), flush=True)
    rows, _ = in_processes(NUM_STAGES, measure, args.turns, args.only, args.quick, timeout=TIMEOUT)
    write_measured(args.folder / "processes.csv", rows)


if __name__ == "__main__":
    main()
