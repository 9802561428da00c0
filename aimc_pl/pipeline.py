"""Runs a schedule over the stages, clock by clock, and tells observers every operation.

All stages may live in one process, or each in its own: every process walks the whole table of the schedule and does the
operations of its stages. What a forward and a backward are is the micro-batch's business.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from aimc_pl.schedule import Operation, Schedule
from aimc_pl.stage import Stage, StageInfo


class MicroBatch(Protocol):
    """What the pipeline needs of a micro-batch."""

    def forward(self, stage: int) -> None:
        """Run the forward of a stage; of every stage of this process once, in order."""
        ...

    def backward(self, stage: int) -> None:
        """Run the backward of a stage, which adds to its parameters' gradients."""
        ...

    def abort(self) -> None:
        """It goes no further."""
        ...


@dataclass(frozen=True)
class Event:
    """One operation of the pipeline.

    Attributes:
        clock: counted over the whole run, drains included.
        stage: the stage at work.
        microbatch: counted over the whole run; of an update once per mini-batch, the last one in it.
        since_fill: the micro-batch counted from the last fill.
        version: updates the stage has made, before this operation.
        staleness: versions between the weights that the micro-batch's forward saw and the current ones.
        in_flight: micro-batches whose activations the stage holds, after this operation.
    """

    clock: int
    stage: StageInfo
    microbatch: int
    since_fill: int
    version: int
    staleness: int
    in_flight: int


class Observer:
    """Told of every operation, in order, right after it happened."""

    def on_start(self, stages: Sequence[StageInfo]) -> None:
        """The step has been divided into stages, of which these are in this process; nothing has run yet."""

    def on_forward(self, event: Event) -> None:
        """A stage has done the forward of a micro-batch."""

    def on_backward(self, event: Event) -> None:
        """A stage has done the backward of a micro-batch; its gradients are there, the update is not done."""

    def on_update(self, event: Event) -> None:
        """A stage has updated its weights."""

    def on_clock(self, clock: int, operations: Sequence[Operation]) -> None:
        """A clock is over, in which these operations of all stages, also of other processes, were due."""


class Pipeline:
    """The clocked pipeline.

    Args:
        stages: the M stages in order, or this process's own.
        schedule: for M stages.
        update: called with a stage when it is to update its weights from its gradients and to clear those
            (asynchronous schedules only; under the others the caller updates all stages after each mini-batch and
            then calls :meth:`updated`).
        observers: told of every operation of these stages; more may be appended to the list at any time.
        clock: clocks before, of a run that goes on.
        num_entered: micro-batches before.
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
        self.observers = observers
        self.clock = clock
        self.num_entered = num_entered
        self._operations = lru_cache(maxsize=1024)(schedule.operations)
        self._update = update
        self._own = {stage.index: stage for stage in stages}
        self._infos = {stage.index: stage.info() for stage in stages}
        self._contributions: dict[int, tuple[int, int, int]] = {}
        """Of every stage with gradients: its last micro-batch, in the run and in the fill, and the oldest version."""
        self._start_fill()
        for observer in observers:
            observer.on_start([*self._infos.values()])

    @property
    def is_empty(self) -> bool:
        """Whether no micro-batch is in flight."""
        return self._num_since_fill == 0

    def last_microbatch(self, stage: Stage) -> int:
        """The micro-batch of a stage's last backward, counted over the whole run, while the stage is updated."""
        return self._contributions[stage.index][0]

    def run(self, microbatches: Sequence[MicroBatch]) -> None:
        """Run one mini-batch.

        All of it, from fill to drain, under a schedule with one update per mini-batch. An asynchronous pipeline stays
        full: it runs until the next micro-batch could enter, and the rest follows with the next call or with
        :meth:`drain`.
        """
        if self.schedule.is_async:
            for microbatch in microbatches:
                self._enter(microbatch)
                self._run_until(self.schedule.forward_clock(0, self._num_since_fill))
        else:
            for microbatch in microbatches:
                self._enter(microbatch)
            self.drain()

    def run_forwards(self, microbatches: Sequence[MicroBatch]) -> None:
        """Run the forwards of one mini-batch under a schedule that has them first; :meth:`drain` runs the backwards."""
        for microbatch in microbatches:
            self._enter(microbatch)
        self._run_until(self.schedule.backward_clock(self.schedule.num_stages - 1, 0, self._num_since_fill))

    def drain(self) -> None:
        """Run until no micro-batch is in flight; the next one starts a new fill."""
        if not self.is_empty:
            self._run_until(self.schedule.num_clocks(self._num_since_fill))
            self._start_fill()

    def updated(self) -> None:
        """Count an update of every stage (the caller's, after a mini-batch) and tell the observers."""
        for stage in self.stages:
            if stage.index in self._contributions:
                self._count_update(stage)

    def abandon(self) -> None:
        """Forget everything in flight, without updates (after an error)."""
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

    def _enter(self, microbatch: MicroBatch) -> None:
        self._microbatches[self._num_since_fill] = microbatch
        self._num_since_fill += 1
        self.num_entered += 1

    def _run_until(self, clock: int) -> None:
        while self._clock_since_fill < clock:
            operations = self._operations(self._clock_since_fill, self._num_since_fill)
            own = [operation for operation in operations if operation.stage in self._own]
            for operation in own:
                (self._forward if operation.kind == "F" else self._backward)(operation)
            if self.schedule.is_async:
                for operation in own:
                    if operation.kind == "B":
                        self._update(self._own[operation.stage])
                        self._count_update(self._own[operation.stage])
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

    def _count_update(self, stage: Stage) -> None:
        event = self._event(stage, *self._contributions.pop(stage.index))
        stage.version += 1
        for observer in self.observers:
            observer.on_update(event)

    def _event(self, stage: Stage, microbatch: int, since_fill: int, seen: int) -> Event:
        staleness = stage.version - seen
        info = self._infos[stage.index]
        return Event(self.clock, info, microbatch, since_fill, stage.version, staleness, stage.num_in_flight)
