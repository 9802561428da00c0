"""This module describes one accelerator of the pipeline: its parameters, its weight version and its micro-batches."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class StageInfo:
    """The parameters and modules of a stage, as observers receive them.

    Attributes:
        index: m, the number of the stage, counted from 0.
        parameters: the parameters that the stage updates.
        modules: the modules that are called in the stage.
    """

    index: int
    parameters: tuple[nn.Parameter, ...] = ()
    modules: tuple[nn.Module, ...] = ()


class Stage:
    """A consecutive part of a training step, which one accelerator computes.

    Args:
        index: m, the number of the stage, counted from 0.
        parameters: the parameters that the stage updates.
        modules: the modules that are called in the stage.

    Attributes:
        version: the weight version, that is, the number of updates so far.
    """

    def __init__(self, index: int, parameters: Iterable[nn.Parameter] = (), modules: Iterable[nn.Module] = ()) -> None:
        self.index = index
        self.parameters = [*parameters]
        self.modules = [*modules]
        self.version = 0
        self._in_flight: dict[int, int] = {}

    @property
    def num_in_flight(self) -> int:
        """The number of micro-batches whose activations the stage holds."""
        return len(self._in_flight)

    def info(self) -> StageInfo:
        """Return the current parameters and modules of the stage, for observers."""
        return StageInfo(self.index, tuple(self.parameters), tuple(self.modules))

    def take(self, microbatch: int) -> None:
        """Note that the forward of a micro-batch begins, with the current weight version."""
        self._in_flight[microbatch] = self.version

    def release(self, microbatch: int) -> int:
        """Note that the backward of a micro-batch is over, and return the weight version that its forward saw."""
        return self._in_flight.pop(microbatch)

    def clear(self) -> None:
        """Forget the micro-batches in flight."""
        self._in_flight.clear()
