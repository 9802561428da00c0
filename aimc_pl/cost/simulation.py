"""This module simulates the operations of a schedule with the times of the stages and of the links between them.

The table of the schedule says in which order each stage works. A stage begins its next operation as soon as the one
before it is over and what it needs has arrived. Two schedules are defined by more than their order:

- under ``none`` one stage works at a time;
- in full duplex a stage alternates between a slot for a forward and a slot for a backward. A slot in which the table
  has no operation (while the pipeline fills and drains) lasts as long as one with an operation.

An update follows the last backward that it needs, at once. With equal stages, updates that take no time and links that
take no time, the operations end with the clock cycles of the table.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Literal

from aimc_pl.arguments import check_number
from aimc_pl.errors import UsageError
from aimc_pl.schedule import Operation, Schedule


@dataclass(frozen=True)
class StageTimes:
    """The times of a stage in seconds (or in any other unit), and what it holds.

    Attributes:
        forward: the time of a forward of one micro-batch.
        backward: the time of a backward of one micro-batch.
        update: the time of updating the weights from one micro-batch.
        step: the further time of every update, from however many micro-batches.
        send: the time for which a forward's result occupies the link to the next stage.
        send_back: the time for which the errors of a backward occupy the link to the stage before.
        kept: the memory that a micro-batch takes from the begin of its forward to the end of its backward.
        pending: the memory that it takes from then to its update.

    Raises:
        UsageError: if a number is not finite, or below 0.
    """

    forward: float = 1.0
    backward: float = 1.0
    update: float = 0.0
    step: float = 0.0
    send: float = 0.0
    send_back: float = 0.0
    kept: float = 0.0
    pending: float = 0.0

    def __post_init__(self) -> None:
        for each in fields(self):
            check_number(f"{each.name} of a stage", getattr(self, each.name), at_least=0)


@dataclass(frozen=True)
class Span:
    """One operation of a stage with its begin and its end.

    Attributes:
        kind: ``"F"``, ``"B"`` or ``"U"``, an update.
        stage: the stage at work.
        microbatch: the micro-batch, counted from the start; of an update, the last of its micro-batches.
        start: the time at which the operation begins.
        end: the time at which it is over.
    """

    kind: Literal["F", "B", "U"]
    stage: int
    microbatch: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What happens when.

    Attributes:
        num_stages: M, the number of stages.
        spans: all operations, in an order in which they can run.
        peaks: for each stage, the most memory that it holds at the same time.
    """

    num_stages: int
    spans: Sequence[Span]
    peaks: Sequence[float]

    @property
    def makespan(self) -> float:
        """The time from the first begin to the last end."""
        return max(span.end for span in self.spans)

    def busy(self, stage: int) -> float:
        """Return the time for which a stage works."""
        return sum(span.end - span.start for span in self.spans if span.stage == stage)

    @property
    def utilization(self) -> float:
        """The share of the time in which a stage works, over all stages."""
        busy = sum(span.end - span.start for span in self.spans)
        return busy / (self.num_stages * self.makespan) if self.makespan else 0.0


def simulate(
    schedule: Schedule, stages: Sequence[StageTimes], latency: float = 0.0, num_minibatches: int = 1
) -> Timeline:
    """Simulate some mini-batches of a schedule, from the first fill to the last drain.

    Args:
        schedule: the schedule. An asynchronous pipeline stays full from one mini-batch to the next.
        stages: the times of its M stages.
        latency: the time from sending to arrival, on top of the time for which a link is occupied.
        num_minibatches: the number of mini-batches.

    Raises:
        UsageError: if the number of stages is not the schedule's, or if a number is out of range.
    """
    if len(stages) != schedule.num_stages:
        raise UsageError(f"the schedule has {schedule.num_stages} stages, got the times of {len(stages)}")
    check_number("latency", latency, at_least=0)
    check_number("num_minibatches", num_minibatches, at_least=1, whole=True)
    size = schedule.num_microbatches
    fills = [num_minibatches * size] if schedule.is_async else [size] * num_minibatches
    run = _Run(schedule, stages, latency)
    for first, fill in zip(accumulate(fills, initial=0), fills, strict=False):
        run.fill(first, fill)
    return Timeline(schedule.num_stages, run.spans, run.peaks())


class _Run:
    """The state of a simulation."""

    def __init__(self, schedule: Schedule, stages: Sequence[StageTimes], latency: float) -> None:
        self.spans: list[Span] = []
        self._schedule = schedule
        self._stages = stages
        self._latency = latency
        self._free = [0.0] * len(stages)
        """The time at which each stage is free again."""
        self._link_free: dict[tuple[int, int], float] = defaultdict(float)
        self._all_free = 0.0
        self._changes: list[list[tuple[float, float]]] = [[] for _ in stages]
        """For each stage, the times at which it takes or releases memory, and how much."""

    def fill(self, first: int, num_microbatches: int) -> None:
        """Simulate the micro-batches from a fill to the next drain. The first of them has the number ``first``."""
        arrived: dict[Operation, float] = {}
        """The times at which each operation has what it needs from neighbours."""
        ended: dict[Operation, float] = {}
        left = [num_microbatches] * len(self._stages)
        for slot in self._slots(num_microbatches):
            kind, index, k = slot
            times = self._stages[index]
            if k < 0:
                idle = times.forward if kind == "F" else times.backward + times.update + times.step
                self._free[index] += idle
                continue
            start = max(self._free[index], arrived.get(slot, 0.0), ended.get(Operation("F", index, k), 0.0))
            if self._schedule.name == "none":
                start = max(start, self._all_free)
            end = start + (times.forward if kind == "F" else times.backward)
            ended[slot] = end
            self.spans.append(Span(kind, index, first + k, start, end))
            towards = index + (1 if kind == "F" else -1)
            if 0 <= towards < len(self._stages):
                arrived[Operation(kind, towards, k)] = self._sent(kind, index, towards, end)
            if kind == "F":
                self._changes[index].append((start, times.kept))
            else:
                left[index] -= 1
                self._changes[index].append((end, times.pending - times.kept))
                end = self._updated(index, first + k, end, num_microbatches, is_last=not left[index])
            self._free[index] = self._all_free = end

    def _slots(self, num_microbatches: int) -> Iterator[Operation]:
        """Yield the operations in order. In full duplex, slots without an operation have the micro-batch −1."""
        for operations in self._schedule.clocks(num_microbatches):
            if self._schedule.duplex == "full":
                at = {(kind, stage): k for kind, stage, k in operations}
                for kind in ("F", "B"):
                    for stage in range(len(self._stages)):
                        yield Operation(kind, stage, at.get((kind, stage), -1))
            else:
                yield from operations

    def _sent(self, kind: str, index: int, towards: int, end: float) -> float:
        """Return when the result of an operation arrives at a neighbour, over a link that sends one at a time."""
        link = index, towards
        self._link_free[link] = max(end, self._link_free[link])
        self._link_free[link] += self._stages[index].send if kind == "F" else self._stages[index].send_back
        return self._link_free[link] + self._latency

    def _updated(self, index: int, microbatch: int, start: float, num_microbatches: int, *, is_last: bool) -> float:
        """Update a stage after a backward, if the schedule does so, and return when it is free."""
        times = self._stages[index]
        if not self._schedule.is_async and not is_last:
            return start
        number = 1 if self._schedule.is_async else num_microbatches
        end = start + number * times.update + times.step
        self._changes[index].append((end, -number * times.pending))
        if end > start:
            self.spans.append(Span("U", index, microbatch, start, end))
        return end

    def peaks(self) -> list[float]:
        """Return the most memory that each stage holds at a time. Memory is released before it is taken."""
        return [max(accumulate((change for _, change in sorted(changes)), initial=0.0)) for changes in self._changes]
