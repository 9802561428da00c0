"""This module holds the paper's pipeline schedules as data: tables that say what each stage does in each clock.

A clock is one column of such a table. With M stages, micro-batch k passes forward through stage m in clock
``a(m) + s·k`` and backward in clock ``c(m) + s·k``. A schedule is therefore defined by two offsets, a and c, and a
stride s. In the tables below, ``F2`` is the forward and ``B2`` the backward of micro-batch 2::

    async, M = 3              clock  0  1  2  3  4  5  6  7  8
                            stage 2        F0 B0 F1 B1 F2 B2
                            stage 1     F0    F1 B0 F2 B1    B2
                            stage 0  F0    F1    F2 B0    B1    B2

    sync, M = 3, B = 3        clock  0  1  2  3  4  5  6  7  8  9
                            stage 2        F0 F1 F2 B0 B1 B2
                            stage 1     F0 F1 F2       B0 B1 B2
                            stage 0  F0 F1 F2             B0 B1 B2

Under ``"zero_bubble"`` a backward has two parts. ``B2`` computes the error that the stage before needs, and ``W2`` the
gradient of the weights, which no other stage waits for. Forwards and B come in the clocks of ``"1f1b"``, and W in the
clocks that these leave free::

    zero_bubble, M = 3, B = 3  clock  0  1  2  3  4  5  6  7  8  9 10
                             stage 2        F0 B0 F1 B1 F2 B2 W0 W1 W2
                             stage 1     F0    F1 B0 F2 B1 W0 B2 W1 W2
                             stage 0  F0    F1    F2 B0 W0 B1 W1 B2 W2
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import ceil
from typing import Literal, NamedTuple, get_args

ScheduleName = Literal["none", "sync", "1f1b", "zero_bubble", "async"]
OperationKind = Literal["F", "B", "W"]
Duplex = Literal["half", "full"]

MAX_STAGES = 1000
MAX_MICROBATCHES = 100_000
"""The largest numbers that :class:`Schedule` accepts. Larger ones, likely typing errors, take minutes to plan."""


class Operation(NamedTuple):
    """What one stage does for one micro-batch: the forward (``"F"``), the backward (``"B"``) or ``"W"``.

    ``"W"`` is the gradient of the weights. Where a table has no ``"W"``, it is a part of the backward.
    """

    kind: OperationKind
    stage: int
    microbatch: int


@dataclass(frozen=True)
class Schedule:
    """A pipeline schedule over ``num_stages`` (M) stages, for mini-batches of ``num_microbatches`` (B) micro-batches.

    Args:
        name: ``"none"`` (one stage works at a time), ``"sync"`` (fill-drain), ``"1f1b"`` (the same clocks as
            ``"sync"``, fewer activations in flight), ``"zero_bubble"`` (``"1f1b"`` with backwards in two parts, the
            second of which fills idle clocks) or ``"async"`` (every stage updates after each of its backwards and the
            pipeline stays full from one mini-batch to the next).
        num_stages: M, from 1 to 1,000.
        num_microbatches: B, from 1 to 100,000.
        duplex: for ``"async"`` only. ``"half"``: a stage does one forward or one backward in a clock. ``"full"``: it
            does one forward and one backward, and such a clock lasts two clock cycles.
        accumulate: a, for ``"async"`` only. A stage makes an update after every a-th of its backwards, from the sum of
            their gradients. The last update before a drain may have fewer.

    A custom schedule is a subclass that overrides :meth:`forward_clock`, :meth:`backward_clock` and, if necessary,
    :attr:`stride`. The tables are computed from these three. If it has the name ``"zero_bubble"``, it may also override
    :meth:`weight_clock`.

    A pipeline fills when micro-batches enter it while it is empty, and drains when the last of them leave it. Methods
    count clocks and micro-batches from the last fill. K is the number of micro-batches that enter between a fill and
    the next drain. Methods take it as ``num_microbatches``, by default B.

    Raises:
        ValueError: if a number is out of range, a name is unknown, or ``duplex="full"`` is used without ``"async"``.
    """

    name: ScheduleName
    num_stages: int
    num_microbatches: int = 1
    duplex: Duplex = "half"
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.name not in get_args(ScheduleName):
            raise ValueError(f"unknown schedule {self.name!r}: choose one of {', '.join(get_args(ScheduleName))}")
        if self.duplex not in get_args(Duplex):
            raise ValueError(f"unknown duplex {self.duplex!r}: choose one of {', '.join(get_args(Duplex))}")
        if self.duplex == "full" and self.name != "async":
            raise ValueError(f"duplex='full' is for schedule='async', not for schedule={self.name!r}")
        if self.accumulate != 1 and self.name != "async":
            raise ValueError(f"accumulate is for schedule='async', not for schedule={self.name!r}")
        limits = {"num_stages": MAX_STAGES, "num_microbatches": MAX_MICROBATCHES, "accumulate": MAX_MICROBATCHES}
        for field, most in limits.items():
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{field} must be a whole number of at least 1 and at most {most}, got {value!r:.50}")

    def accumulating(self, num_microbatches: int) -> "Schedule":
        """Return the same schedule, in which every stage makes one update from ``num_microbatches`` micro-batches."""
        changed = copy(self)
        object.__setattr__(changed, "accumulate", num_microbatches)
        return changed

    @property
    def is_async(self) -> bool:
        """Whether stages update after every micro-batch instead of once per mini-batch."""
        return self.name == "async"

    @property
    def splits_backward(self) -> bool:
        """Whether the error and the gradient of the weights are separate operations, ``"B"`` and ``"W"``."""
        return self.name == "zero_bubble"

    @property
    def num_operations(self) -> int:
        """The number of operations of a micro-batch at a stage: 3 if backwards are split, else 2."""
        return 3 if self.splits_backward else 2

    @property
    def cycles_per_clock(self) -> int:
        """The clock cycles that one clock of the table lasts. A clock cycle is the time of one operation."""
        return 2 if self.duplex == "full" else 1

    @property
    def stride(self) -> int:
        """The number of clocks between two successive micro-batches at one stage."""
        return 2 if self.name in ("1f1b", "zero_bubble") or (self.is_async and self.duplex == "half") else 1

    def forward_clock(self, stage: int, microbatch: int, num_microbatches: int | None = None) -> int:
        """Return the clock of F(stage, microbatch), the forward of a micro-batch at a stage, counted from the fill."""
        batches = self.num_microbatches if num_microbatches is None else num_microbatches
        offset = stage * batches if self.name == "none" else stage
        return offset + self.stride * microbatch

    def backward_clock(self, stage: int, microbatch: int, num_microbatches: int | None = None) -> int:
        """Return the clock of B(stage, microbatch), the backward of a micro-batch at a stage, counted from the fill."""
        batches = self.num_microbatches if num_microbatches is None else num_microbatches
        to_last = self.num_stages - 1 - stage
        if self.name == "none":
            offset = (self.num_stages + to_last) * batches
        elif self.name == "sync":
            offset = self.num_stages + batches - 1 + to_last
        else:
            # The last stage does a backward one clock after its forward; in full duplex, in the same clock.
            offset = self.num_stages - 1 + to_last + (self.duplex == "half")
        return offset + self.stride * microbatch

    def weight_clock(self, stage: int, microbatch: int, num_microbatches: int | None = None) -> int:
        """Return the clock of W(stage, microbatch), the gradient of a stage's weights, counted from the fill.

        A free clock follows each of the last M−1−m backwards of stage m, because no forward is left for it. After the
        last backward all clocks are free.
        """
        batches = self.num_microbatches if num_microbatches is None else num_microbatches
        between = min(self.num_stages - 1 - stage, batches - 1)
        first = self.backward_clock(stage, batches - 1 - between, batches) + 1
        return first + microbatch + min(microbatch, between)

    def operations(self, clock: int, num_microbatches: int | None = None) -> list[Operation]:
        """Return the operations of ``clock``: forwards, backwards, gradients of weights, each by ascending stage.

        Args:
            clock: the clock, counted from the fill.
            num_microbatches: K; ``None`` while the number of micro-batches is not yet known (``"async"`` only).
        """
        operations = []
        passes: tuple[tuple[OperationKind, Callable[..., int]], ...] = (
            ("F", self.forward_clock),
            ("B", self.backward_clock),
        )
        for kind, first_clock in passes:
            for stage in range(self.num_stages):
                since_first = clock - first_clock(stage, 0, num_microbatches)
                microbatch, between = divmod(since_first, self.stride)
                if since_first >= 0 and not between and (num_microbatches is None or microbatch < num_microbatches):
                    operations.append(Operation(kind, stage, microbatch))
        if self.splits_backward:
            batches = self.num_microbatches if num_microbatches is None else num_microbatches
            for stage in range(self.num_stages):
                clock_of = partial(self.weight_clock, stage, num_microbatches=batches)
                microbatch = bisect_left(range(batches), clock, key=clock_of)
                if microbatch < batches and clock_of(microbatch) == clock:
                    operations.append(Operation("W", stage, microbatch))
        return operations

    def clocks(self, num_microbatches: int | None = None) -> Iterator[list[Operation]]:
        """Yield the operations of each clock, from the fill to the end of the drain of K micro-batches."""
        batches = self.num_microbatches if num_microbatches is None else num_microbatches
        for clock in range(self.num_clocks(batches)):
            yield self.operations(clock, batches)

    def num_clocks(self, num_microbatches: int | None = None) -> int:
        """Return the number of clocks from the fill to the end of the drain of K micro-batches."""
        batches = self.num_microbatches if num_microbatches is None else num_microbatches
        last_clock = self.weight_clock if self.splits_backward else self.backward_clock
        return max(last_clock(stage, batches - 1, batches) for stage in range(self.num_stages)) + 1

    @property
    def forwards_first(self) -> bool:
        """Whether all forwards of a mini-batch come before its first backward."""
        last = self.num_microbatches - 1
        forwards = (self.forward_clock(stage, last, last + 1) for stage in range(self.num_stages))
        return not self.is_async and max(forwards) < self.backward_clock(self.num_stages - 1, 0, last + 1)

    def num_cycles(self, num_microbatches: int | None = None) -> int:
        """Return the number of clock cycles from the fill to the end of the drain of K micro-batches.

        This is 2MK with ``"none"``, 2(M+K−1) with ``"sync"``, ``"1f1b"`` and ``"async"``, and 2(K+2M−2) in full
        duplex. It is 3K+M−1 with ``"zero_bubble"``, or 2(M+K)−1 if K is less than M. Only ``"zero_bubble"`` counts
        cycles for the gradients of weights.
        """
        return self.num_clocks(num_microbatches) * self.cycles_per_clock

    def density(self, num_microbatches: int | None = None) -> float:
        """Return the computation density, fill and drain included.

        This is the number of busy accelerator-cycles over the number of all accelerator-cycles. An accelerator-cycle
        is one clock cycle of one accelerator.
        """
        batches = self.num_microbatches if num_microbatches is None else num_microbatches
        return self.num_operations * batches / self.num_cycles(batches)

    def speedup(self, num_microbatches: int | None = None) -> float:
        """Return how many times fewer clock cycles the pipeline needs than one accelerator with all stages.

        One accelerator needs 2MK clock cycles, and 3MK if the gradients of weights are counted (``"zero_bubble"``).
        """
        return self.num_stages * self.density(num_microbatches)

    def max_staleness(self, stage: int) -> int:
        """Return the staleness of the updates of ``stage`` once the pipeline is full (see :meth:`staleness`).

        This is d = M−1−m with ``"async"``, twice that in full duplex, and 0 with the other schedules. If a stage
        accumulates the gradients of a micro-batches, it is ⌈d/a⌉ (PACI, arXiv 2606.07881).
        """
        return ceil(self._delay(stage) / self.accumulate) if self.is_async else 0

    def staleness(self, stage: int, microbatch: int) -> int:
        """Return the staleness of the update that ``stage`` makes from ``microbatch``.

        This is the number of weight versions between the weights that F(stage, microbatch) saw and the weights that
        the update is added to. For an update from several micro-batches, ``microbatch`` is the last of them, and the
        oldest weights that they saw count.
        """
        return min(microbatch // self.accumulate, self.max_staleness(stage))

    def version(self, stage: int, microbatch: int) -> int:
        """Return the weight version that F(stage, microbatch) sees: the number of updates since the fill.

        This is always 0 under a schedule with one update per mini-batch, because every mini-batch starts a new fill.
        """
        return max(0, microbatch - self._delay(stage)) // self.accumulate if self.is_async else 0

    def in_flight(self, stage: int, num_microbatches: int | None = None) -> int:
        """Return the largest number of micro-batches whose activations ``stage`` holds at the same time.

        This is K, the number of micro-batches between fill and drain, with ``"none"`` and ``"sync"``. It is at most
        M−m with ``"1f1b"``, ``"zero_bubble"`` and ``"async"``, and at most 2(M−1−m)+1 in full duplex. What ``"W"``
        needs of a micro-batch is held for longer.
        """
        batches = self.num_microbatches if num_microbatches is None else num_microbatches
        before_backward = self.backward_clock(stage, 0, batches) - self.forward_clock(stage, 0, batches)
        return min(batches, before_backward // self.stride + 1)

    def _delay(self, stage: int) -> int:
        """Return how many later micro-batches have their forward at ``stage`` before the backward of a micro-batch."""
        since_first_backward = self.forward_clock(stage, 0) - self.backward_clock(stage, 0)
        return -ceil(since_first_backward / self.stride)


def check_order(schedule: Schedule) -> None:
    """Check that a schedule's table contains all operations, in an order in which they can run.

    The table that is checked is B micro-batches long, and B+2M with ``"async"``.

    Raises:
        ValueError: if an operation comes before one that it needs, is left out, or finds its stage busy. The message
            names the first such operation.
    """
    total = schedule.num_microbatches + 2 * schedule.num_stages if schedule.is_async else schedule.num_microbatches
    table = [*schedule.clocks(total)]
    clocks = {operation: clock for clock, operations in enumerate(table) for operation in operations}
    last = schedule.num_stages - 1
    for k in range(total):
        path = [Operation("F", stage, k) for stage in range(last + 1)]
        path += [Operation("B", stage, k) for stage in reversed(range(last + 1))]
        steps = [*pairwise(path)]
        if schedule.splits_backward:
            steps += [(Operation("B", stage, k), Operation("W", stage, k)) for stage in range(last + 1)]
        for before, after in steps:
            if missing := [operation for operation in (before, after) if operation not in clocks]:
                raise ValueError(f"{type(schedule).__name__} has no clock for {_shown(missing[0])}")
            # Forwards run before backwards within a clock, so the two of one stage may share a clock.
            turns_around = before.stage == after.stage and after.kind == "B"
            if clocks[after] < clocks[before] + (not turns_around):
                raise ValueError(
                    f"{type(schedule).__name__} has {_shown(after)} in clock {clocks[after]}, and {_shown(before)}, "
                    f"which it needs, in clock {clocks[before]}"
                )
    for clock, operations in enumerate(table if schedule.duplex == "half" else ()):
        busy: dict[int, Operation] = {}
        for operation in operations:
            if (other := busy.setdefault(operation.stage, operation)) is not operation:
                raise ValueError(
                    f"{type(schedule).__name__} has {_shown(other)} and {_shown(operation)} in clock {clock}, and in "
                    "half duplex a stage does one of them"
                )


def _shown(operation: Operation) -> str:
    return f"{operation.kind}(stage {operation.stage}, micro-batch {operation.microbatch})"
