"""This module simulates the operations of a schedule with the times of the stages and of the links between them.

The table of the schedule says in which order each stage works. A stage begins its next operation as soon as the one
before it is over and what it needs has arrived. Two schedules are defined by more than their order:

- under ``none`` one stage at a time does forwards or backwards;
- in full duplex a stage alternates between a slot for a forward and a slot for a backward. A slot in which the table
  has no operation (while the pipeline fills and drains) lasts as long as one with an operation.

An update follows the last operation that it needs, at once. Where the table has gradients of weights as operations of
their own, a backward takes only the rest of its time.

With equal stages, updates that take no time and links that take no time, the operations end with the clock cycles of
the table.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Literal

from aimc_pl.arguments import check_number
from aimc_pl.errors import UsageError
from aimc_pl.schedule import Operation, OperationKind, Schedule


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
        gradient: the part of the time of a backward in which the gradients of weights are computed.
        deferred: the memory that a micro-batch takes from its backward until then, if this is an operation of its own.

    Raises:
        UsageError: if a number is not finite, or below 0, or if ``gradient`` is above ``backward``.
    """

    forward: float = 1.0
    backward: float = 1.0
    update: float = 0.0
    step: float = 0.0
    send: float = 0.0
    send_back: float = 0.0
    kept: float = 0.0
    pending: float = 0.0
    gradient: float = 0.0
    deferred: float = 0.0

    def __post_init__(self) -> None:
        for each in fields(self):
            check_number(f"{each.name} of a stage", getattr(self, each.name), at_least=0)
        check_number("gradient of a stage, a part of its backward,", self.gradient, at_least=0, at_most=self.backward)


@dataclass(frozen=True)
class Span:
    """One operation of a stage with its begin and its end.

    Attributes:
        kind: ``"F"``, ``"B"``, ``"W"`` or ``"U"``, an update.
        stage: the stage at work.
        microbatch: the micro-batch, counted from the start; of an update, the last of its micro-batches.
        start: the time at which the operation begins.
        end: the time at which it is over.
    """

    kind: OperationKind | Literal["U"]
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
    check_number("num_minibatches", num_minibatches, at_least=1, whole=True)
    run = Simulation(schedule, stages, latency)
    size = schedule.num_microbatches
    for fill in [num_minibatches * size] if schedule.is_async else [size] * num_minibatches:
        for operations in schedule.clocks(fill):
            run.clock(operations)
        for stage in reversed(range(schedule.num_stages)):
            run.update(stage)
    return run.timeline()


class Simulation:
    """A simulation that is fed clock by clock.

    Args:
        schedule: the schedule.
        stages: the times of its M stages.
        latency: the time from sending to arrival, on top of the time for which a link is occupied.
        keeps_timeline: whether to keep what :meth:`timeline` returns. A long run would fill the memory with it.

    Attributes:
        seconds: the time until now: the end of the last operation or update.

    Raises:
        UsageError: if the number of stages is not the schedule's, or if a number is out of range.
    """

    def __init__(
        self, schedule: Schedule, stages: Sequence[StageTimes], latency: float = 0.0, keeps_timeline: bool = True
    ) -> None:
        if len(stages) != schedule.num_stages:
            raise UsageError(f"the schedule has {schedule.num_stages} stages, got the times of {len(stages)}")
        check_number("latency", latency, at_least=0)
        self.seconds = 0.0
        self._schedule = schedule
        self._accumulate = schedule.accumulate
        self._stages = stages
        self._latency = latency
        self._keeps_timeline = keeps_timeline
        self._spans: list[Span] = []
        self._changes: list[list[tuple[float, float]]] = [[] for _ in stages]
        """For each stage, the times at which it takes or releases memory, and how much."""
        self._free = [0.0] * len(stages)
        """The time at which each stage is free again."""
        self._link_free: dict[tuple[int, int], float] = defaultdict(float)
        self._ready: dict[Operation, float] = {}
        """The time at which an operation has what it needs: from a neighbour, or from the stage's own forward."""
        self._waiting: list[list[int]] = [[] for _ in stages]
        """For each stage, the micro-batches whose backward has run since its last update."""
        self._all_done = 0.0
        """The time at which the last forward or backward is over."""
        self._first = 0
        """The number of micro-batches before the last fill."""
        self._entered = 0
        """The number of micro-batches since the last fill."""

    def clock(self, operations: Sequence[Operation], running: Schedule | None = None) -> None:
        """Simulate one clock. Clocks follow one another as the schedule yields them, from fill to drain.

        Args:
            operations: the operations of the clock.
            running: the schedule of the mini-batch that runs, if it is not the simulation's: the same table, in which
                updates are made from another number of micro-batches (see :attr:`aimc_pl.pipeline.Pipeline.running`).
        """
        self._accumulate = (running or self._schedule).accumulate
        if Operation("F", 0, 0) in operations:
            self._first += self._entered
            self._entered = 0
            self._ready.clear()
        for operation in operations if self._schedule.duplex == "half" else self._slots(operations):
            kind, index, k = operation
            times = self._stages[index]
            if k < 0:
                idle = times.forward if kind == "F" else times.backward + times.update + times.step
                self._free[index] += idle
            elif kind == "F":
                self._forward(operation)
            elif kind == "B":
                self._backward(operation)
            else:
                self._weight_gradient(operation)

    def update(self, index: int) -> None:
        """Update a stage from all backwards since its last update, if there are any.

        Under an asynchronous schedule the backwards do this. Where stages accumulate, a rest may be left at a drain.
        """
        times, waiting = self._stages[index], self._waiting[index]
        if not waiting:
            return
        start = self._free[index]
        end = start + len(waiting) * times.update + times.step
        self._changes[index].append((end, -len(waiting) * times.pending))
        if end > start:
            self._note(Span("U", index, waiting[-1], start, end))
        waiting.clear()

    def awaits_update(self, index: int, microbatch: int) -> bool:
        """Return whether the last backward of a stage was that of ``microbatch``, and no update has followed yet."""
        return self._waiting[index][-1:] == [self._first + microbatch]

    def timeline(self) -> Timeline:
        """Return all that has happened. Stages release memory before they take more at the same time."""
        peaks = [max(accumulate((change for _, change in sorted(own)), initial=0.0)) for own in self._changes]
        return Timeline(len(self._stages), self._spans, peaks)

    def _slots(self, operations: Sequence[Operation]) -> Iterator[Operation]:
        """Yield the slots of a clock in full duplex. A slot without an operation has the micro-batch −1."""
        at = {(kind, stage): k for kind, stage, k in operations}
        kinds: tuple[Literal["F"], Literal["B"]] = ("F", "B")
        for kind in kinds:
            for stage in range(len(self._stages)):
                yield Operation(kind, stage, at.get((kind, stage), -1))

    def _start(self, index: int, ready: float) -> float:
        """Return when a stage can begin with a forward or backward that is ready at a time."""
        return max(ready, self._free[index], self._all_done if self._schedule.name == "none" else 0.0)

    def _forward(self, operation: Operation) -> None:
        _, index, k = operation
        self._entered += index == 0
        start = self._start(index, self._ready.pop(operation, 0.0))
        end = start + self._stages[index].forward
        self._note(Span("F", index, self._first + k, start, end))
        self._changes[index].append((start, self._stages[index].kept))
        self._ready[Operation("B", index, k)] = end
        if index + 1 < len(self._stages):
            self._send(Operation("F", index + 1, k), (index, index + 1), end, self._stages[index].send)

    def _backward(self, operation: Operation) -> None:
        _, index, k = operation
        times = self._stages[index]
        start = self._start(index, self._ready.pop(operation))
        splits = self._schedule.splits_backward
        end = start + times.backward - (times.gradient if splits else 0.0)
        self._note(Span("B", index, self._first + k, start, end))
        self._changes[index].append((end, times.pending + (times.deferred if splits else 0.0) - times.kept))
        self._waiting[index].append(self._first + k)
        if index:
            self._send(Operation("B", index - 1, k), (index, index - 1), end, times.send_back)
        if self._schedule.is_async and (k + 1) % self._accumulate == 0:
            self.update(index)

    def _weight_gradient(self, operation: Operation) -> None:
        _, index, k = operation
        times, start = self._stages[index], self._free[index]
        end = start + times.gradient
        self._changes[index].append((end, -times.deferred))
        if end > start:
            self._note(Span("W", index, self._first + k, start, end))

    def _send(self, needed_by: Operation, link: tuple[int, int], start: float, duration: float) -> None:
        """Send a result to a neighbour over a link, which carries one at a time."""
        self._link_free[link] = max(start, self._link_free[link]) + duration
        arrival = self._link_free[link] + self._latency
        self._ready[needed_by] = max(arrival, self._ready.get(needed_by, 0.0))

    def _note(self, span: Span) -> None:
        self._free[span.stage] = span.end
        self.seconds = max(self.seconds, span.end)
        if span.kind != "U":
            self._all_done = max(self._all_done, span.end)
        if self._keeps_timeline:
            self._spans.append(span)
