"""One accelerator of the pipeline: what it holds, its weight version, and the micro-batches that it works on."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class StageInfo:
    """What a stage holds, as observers are told.

    Attributes:
        index: m, from 0.
        parameters: what the stage updates.
        modules: those that are called in it.
    """

    index: int
    parameters: tuple[nn.Parameter, ...] = ()
    modules: tuple[nn.Module, ...] = ()


class Stage:
    """A consecutive part of a training step, on one accelerator.

    Args:
        index: m, from 0.
        parameters: what the stage updates.
        modules: those that are called in it.

    Attributes:
        version: updates so far.
    """

    def __init__(self, index: int, parameters: Iterable[nn.Parameter] = (), modules: Iterable[nn.Module] = ()) -> None:
        self.index = index
        self.parameters = [*parameters]
        self.modules = [*modules]
        self.version = 0
        self._in_flight: dict[int, int] = {}

    @property
    def num_in_flight(self) -> int:
        """Micro-batches whose activations the stage holds."""
        return len(self._in_flight)

    def info(self) -> StageInfo:
        """What the stage holds now, for observers."""
        return StageInfo(self.index, tuple(self.parameters), tuple(self.modules))

    def take(self, microbatch: int) -> None:
        """The forward of a micro-batch begins, with the current version."""
        self._in_flight[microbatch] = self.version

    def release(self, microbatch: int) -> int:
        """The backward of a micro-batch is over; returns the version that its forward saw."""
        return self._in_flight.pop(microbatch)

    def clear(self) -> None:
        """Forget the micro-batches in flight."""
        self._in_flight.clear()
