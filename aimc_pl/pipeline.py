"""This module runs a schedule over the stages, clock by clock, and tells observers about every operation.

All stages may live in one process, or each in a separate process. Every process walks through the whole table of the
schedule and does the operations of its own stages. The micro-batches define what a forward and a backward do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from aimc_pl.schedule import Operation, Schedule
from aimc_pl.stage import Stage, StageInfo


class MicroBatch(Protocol):
    """The methods of a micro-batch that the pipeline calls."""

    def forward(self, stage: int) -> None:
        """Run the forward of a stage. The pipeline calls this once for every stage of this process, in order."""
        ...

    def backward(self, stage: int) -> None:
        """Run the backward of a stage, and add to the gradients of its parameters."""
        ...

    def abort(self) -> None:
        """End the micro-batch where it is. The pipeline runs no more of it."""
        ...


@dataclass(frozen=True)
class Event:
    """One operation of the pipeline.

    Attributes:
        clock: the clock of the operation, counted over the whole run, drains included.
        stage: the stage at work.
        microbatch: the micro-batch, counted over the whole run. For an update once per mini-batch, this is the last
            micro-batch of the mini-batch.
        since_fill: the same micro-batch, counted from the last fill.
        version: the number of updates that the stage had made before this operation.
        staleness: the number of weight versions between the weights that the micro-batch's forward saw and the current
            ones. For an update from several micro-batches, the oldest of these versions counts.
        predicted: the schedule's closed form of the staleness of an update from this micro-batch.
        in_flight: the number of micro-batches whose activations the stage holds after this operation.
    """

    clock: int
    stage: StageInfo
    microbatch: int
    since_fill: int
    version: int
    staleness: int
    predicted: int
    in_flight: int


class Observer:
    """A listener that is told about every operation, in order, right after the operation."""

    def on_start(self, stages: Sequence[StageInfo]) -> None:
        """Handle the start: the step has been divided, nothing has run, and ``stages`` are those of this process."""

    def on_forward(self, event: Event) -> None:
        """Handle the end of a micro-batch's forward at a stage."""

    def on_backward(self, event: Event) -> None:
        """Handle the end of a micro-batch's backward at a stage.

        The parameters have the gradients now, and have not been updated from them yet. This holds under
        ``"zero_bubble"`` too: a run computes the gradients of weights in the backward.
        """

    def on_weight_gradient(self, event: Event) -> None:
        """Handle the clock in which a stage computes the gradient of its weights from a micro-batch.

        Only ``"zero_bubble"`` has such clocks.
        """

    def on_update(self, event: Event) -> None:
        """Handle the end of an update of a stage's weights."""

    def on_clock(self, clock: int, operations: Sequence[Operation]) -> None:
        """Handle the end of a clock. ``operations`` are those of all stages in this clock, other processes included."""


class Pipeline:
    """A pipeline that runs the operations of a schedule, clock by clock.

    Args:
        stages: the M stages in order, or only the stages of this process.
        schedule: a schedule for M stages.
        update: a function that updates a stage's weights from its gradients and then clears the gradients. Only
            asynchronous schedules call it. Under the others the caller updates all stages after each mini-batch and
            then calls :meth:`updated`.
        observers: the observers of these stages' operations. More may be appended to the list at any time.
        clock: the number of clocks that a resumed run has already had.
        num_entered: the number of micro-batches that a resumed run has already had.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        schedule: Schedule,
        update: Callable[[Stage], None],
        observers: Sequence[Observer] = (),
        clock: int = 0,
        num_entered: int = 0,
    ) -> None:
        self.stages = stages
        self.schedule = schedule
        self.running = schedule
        """The schedule of the mini-batch that runs. It differs from ``schedule`` where stages wait for each other."""
        self.observers = observers
        self.clock = clock
        self.num_entered = num_entered
        self._operations = lru_cache(maxsize=1024)(schedule.operations)
        self._update = update
        self._own = {stage.index: stage for stage in stages}
        self._run_one = {"F": self._forward, "B": self._backward, "W": self._weight_gradient}
        self._infos = {stage.index: stage.info() for stage in stages}
        self._contributions: dict[int, tuple[int, int, int]] = {}
        """For each stage with gradients: the last micro-batch that added to them, counted over the run and in the fill,
        and the oldest weight version that a forward of the micro-batches saw."""
        self._start_fill()
        for observer in observers:
            observer.on_start([*self._infos.values()])

    @property
    def is_empty(self) -> bool:
        """Whether no micro-batch is in flight."""
        return self._num_since_fill == 0

    def last_microbatch(self, stage: Stage) -> int:
        """Return the micro-batch of a stage's last backward, counted over the whole run.

        Call this only while the stage is updated.
        """
        return self._contributions[stage.index][0]

    def staleness(self, stage: Stage) -> int:
        """Return the schedule's closed form of the staleness of the update that a stage makes.

        Call this only while the stage is updated.
        """
        return self.running.staleness(stage.index, self._contributions[stage.index][1])

    def run(self, microbatches: Sequence[MicroBatch], in_sync: bool = False) -> None:
        """Run one mini-batch.

        Under a schedule with one update per mini-batch, all of the mini-batch is run, from fill to drain. An
        asynchronous pipeline stays full: it runs until the next micro-batch could enter. The next call or
        :meth:`drain` runs the rest.

        Args:
            microbatches: the micro-batches of the mini-batch.
            in_sync: whether an asynchronous pipeline runs this mini-batch as ``"1f1b"`` would: from fill to drain, with
                one update of every stage.
        """
        if in_sync:
            self.drain()
            self.running = self.schedule.accumulating(len(microbatches))
        if self.schedule.is_async and not in_sync:
            for microbatch in microbatches:
                self._enter(microbatch)
                self._run_until(self.schedule.forward_clock(0, self._num_since_fill))
        else:
            for microbatch in microbatches:
                self._enter(microbatch)
            self.drain()

    def run_forwards(self, microbatches: Sequence[MicroBatch]) -> None:
        """Run the forwards of a mini-batch, if the schedule has all of them first. :meth:`drain` runs the backwards."""
        for microbatch in microbatches:
            self._enter(microbatch)
        self._run_until(self.schedule.backward_clock(self.schedule.num_stages - 1, 0, self._num_since_fill))

    def drain(self) -> None:
        """Run until no micro-batch is in flight. The next micro-batch starts a new fill."""
        if not self.is_empty:
            self._run_until(self.schedule.num_clocks(self._num_since_fill))
            if self.schedule.is_async:
                for stage in [stage for stage in self.stages if stage.index in self._contributions]:
                    self._update_one(stage)
            self._start_fill()

    def updated(self) -> None:
        """Count an update of every stage that has gradients, and tell the observers.

        The caller makes this update itself, after each mini-batch.
        """
        for stage in self.stages:
            if stage.index in self._contributions:
                self._count_update(stage)

    def abandon(self) -> None:
        """Abort everything in flight, without updates. Call this after an error."""
        for stage in self.stages:
            stage.clear()
        self._contributions.clear()
        for microbatch in self._microbatches.values():
            microbatch.abort()
        self._start_fill()

    def _start_fill(self) -> None:
        self._first = self.num_entered
        self._num_since_fill = 0
        self._clock_since_fill = 0
        self._microbatches: dict[int, MicroBatch] = {}
        self.running = self.schedule

    def _enter(self, microbatch: MicroBatch) -> None:
        self._microbatches[self._num_since_fill] = microbatch
        self._num_since_fill += 1
        self.num_entered += 1

    def _run_until(self, clock: int) -> None:
        while self._clock_since_fill < clock:
            operations = self._operations(self._clock_since_fill, self._num_since_fill)
            own = [operation for operation in operations if operation.stage in self._own]
            for operation in own:
                self._run_one[operation.kind](operation)
            if self.schedule.is_async:
                for operation in own:
                    if operation.kind == "B" and (operation.microbatch + 1) % self.running.accumulate == 0:
                        self._update_one(self._own[operation.stage])
            for observer in self.observers:
                observer.on_clock(self.clock, operations)
            self._clock_since_fill += 1
            self.clock += 1

    def _forward(self, operation: Operation) -> None:
        _, index, k = operation
        stage = self._own[index]
        stage.take(k)
        self._microbatches[k].forward(index)
        for observer in self.observers:
            observer.on_forward(self._event(stage, self._first + k, k, stage.version))

    def _backward(self, operation: Operation) -> None:
        _, index, k = operation
        stage = self._own[index]
        self._microbatches[k].backward(index)
        seen = stage.release(k)
        if index == min(self._own):
            del self._microbatches[k]
        *_, oldest = self._contributions.get(index, (seen,))
        self._contributions[index] = self._first + k, k, min(seen, oldest)
        for observer in self.observers:
            observer.on_backward(self._event(stage, self._first + k, k, seen))

    def _weight_gradient(self, operation: Operation) -> None:
        _, index, k = operation
        stage = self._own[index]
        *_, oldest = self._contributions[index]
        for observer in self.observers:
            observer.on_weight_gradient(self._event(stage, self._first + k, k, oldest))

    def _update_one(self, stage: Stage) -> None:
        self._update(stage)
        self._count_update(stage)

    def _count_update(self, stage: Stage) -> None:
        event = self._event(stage, *self._contributions.pop(stage.index))
        stage.version += 1
        for observer in self.observers:
            observer.on_update(event)

    def _event(self, stage: Stage, microbatch: int, since_fill: int, seen: int) -> Event:
        staleness = stage.version - seen
        predicted = self.running.staleness(stage.index, since_fill)
        info = self._infos[stage.index]
        return Event(self.clock, info, microbatch, since_fill, stage.version, staleness, predicted, stage.num_in_flight)
