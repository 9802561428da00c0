"""The classes in this module reduce what stale weights cost an asynchronous pipeline, by means that a crossbar has.

They keep no copy of weights. Several of them can be combined: ``AnalogPipelineStrategy(remedies=[...])``.
"""

from dataclasses import dataclass
from typing import override

from aimc_pl.arguments import check_number
from aimc_pl.schedule import MAX_MICROBATCHES, Schedule


class Remedy:
    """A change of the asynchronous training that lowers the cost of stale weights. A subclass overrides some methods.

    In the arguments, ``step`` is the number of mini-batches of the whole run before the one that runs.
    """

    def change(self, schedule: Schedule) -> Schedule:
        """Return the schedule that the training uses in place of ``schedule``, asynchronous and of the same size."""
        return schedule

    def runs_in_sync(self, step: int) -> bool:
        """Return whether the pipeline runs a mini-batch from fill to drain, with one update of every stage."""
        return False

    def rate_factor(self, staleness: int, step: int) -> float:
        """Return the factor of the learning rate of an update, a finite number of at least 0.

        Args:
            staleness: the staleness of the update.
            step: see the class.
        """
        return 1.0


@dataclass(frozen=True)
class StageLearningRate(Remedy):
    """Lower the learning rate η of stale updates: an update of staleness d uses η/(1+d)^p.

    With p = 1 this is the staleness-aware rate of arXiv 1511.05950. An exponent that decreases to 0 makes it the first
    technique of PipeMare (arXiv 1910.05124).

    Args:
        power: p, at least 0.
        anneal_steps: the number of mini-batches over which the exponent decreases linearly from p to 0. By default it
            stays at p.

    Raises:
        UsageError: if an argument is out of range.
    """

    power: float = 1.0
    anneal_steps: int | None = None

    def __post_init__(self) -> None:
        check_number("power", self.power, at_least=0)
        if self.anneal_steps is not None:
            check_number("anneal_steps", self.anneal_steps, at_least=1, whole=True)

    @override
    def rate_factor(self, staleness: int, step: int) -> float:
        remaining = 1.0 if self.anneal_steps is None else max(0.0, 1 - step / self.anneal_steps)
        return (1 + staleness) ** (-self.power * remaining)


@dataclass(frozen=True)
class Accumulation(Remedy):
    """Let every stage sum the gradients of several micro-batches, and then make one update.

    A micro-batch then sees at most ⌈d/a⌉ updates of a stage between its forward and its backward, where d is the
    staleness without accumulation (PACI, arXiv 2606.07881).

    Args:
        num_microbatches: a, the number of micro-batches per update.

    Raises:
        UsageError: if the number is out of range.
    """

    num_microbatches: int = 2

    def __post_init__(self) -> None:
        check_number("num_microbatches", self.num_microbatches, at_least=1, at_most=MAX_MICROBATCHES, whole=True)

    @override
    def change(self, schedule: Schedule) -> Schedule:
        return schedule.accumulating(self.num_microbatches)


@dataclass(frozen=True)
class SyncStart(Remedy):
    """Train the first mini-batches as schedule ``"1f1b"`` does, with one update of every stage per mini-batch.

    Weights change most at the start of a training, where staleness harms most. The clock cycles of these mini-batches
    are those of ``"1f1b"``, and in full duplex 2(B+2M−2) each. Gradients are still clipped by stage.

    Args:
        steps: the number of mini-batches.

    Raises:
        UsageError: if the number is out of range.
    """

    steps: int

    def __post_init__(self) -> None:
        check_number("steps", self.steps, at_least=1, whole=True)

    @override
    def runs_in_sync(self, step: int) -> bool:
        return step < self.steps
