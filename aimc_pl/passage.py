"""A training step as it is written, run by one process per stage (see :mod:`aimc_pl.ghosts`)."""

from collections.abc import Callable
from contextlib import nullcontext
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from aimc_pl.analog import own_pending_errors
from aimc_pl.distributed import Link
from aimc_pl.ghosts import Flight, Ghosts
from aimc_pl.private_torch import versions_of
from aimc_pl.saved import SavedParameters, current_weights
from aimc_pl.schedule import Operation
from aimc_pl.stage import Stage


class StageProcess:
    """What the micro-batches of a training have in common at the stage of this process.

    Args:
        ghosts: run the stage.
        link: to the stages before and after.
        stage: of this process.
        num_stages: M.
        delayed: see :class:`aimc_pl.flight.StagedStep`.
        saved: what autograd saves of parameters, where references to them would not do.
        seed: of the random numbers that micro-batches draw, the same in all processes.
        count: micro-batches and batches of evaluation so far.
    """

    def __init__(
        self,
        ghosts: Ghosts,
        link: Link,
        stage: Stage,
        num_stages: int,
        *,
        delayed: bool = False,
        saved: SavedParameters | None = None,
        seed: int = 0,
        count: int = 0,
    ) -> None:
        self.ghosts = ghosts
        self.link = link
        self.stage = stage
        self.is_last = stage.index == num_stages - 1
        self.delayed = delayed
        self.saved = saved
        self._seed = seed
        self.count = count

    def microbatch(self, function: Callable[[], Any], weight: float, inputs: Any) -> "Passage":
        """A micro-batch for the pipeline.

        Args:
            function: the step, which computes the loss, or ``None`` to learn nothing.
            weight: what the loss counts in the gradient.
            inputs: the micro-batch.
        """
        return Passage(self, self._next(), function, weight, inputs)

    def infer(self, function: Callable[[], Any], inputs: Any) -> Any:
        """Run a step forward only; returns its result in the process of the last stage, ``None`` in others."""
        number, index = self._next(), self.stage.index
        message = self.link.receive(Operation("F", index, number)) if index else None
        flight = self.ghosts.infer(function, message, self.seed(number), inputs)
        if flight.outgoing is not None:
            self.link.send(Operation("F", index + 1, number), flight.outgoing)
        return flight.result

    def seed(self, number: int) -> int:
        """Of a micro-batch's random numbers."""
        return int.from_bytes(blake2b(f"{self._seed} {number}".encode(), digest_size=8).digest())

    def _next(self) -> int:
        self.count += 1
        return self.count


class Passage:
    """A micro-batch at the stage of this process (see :class:`aimc_pl.pipeline.MicroBatch`)."""

    def __init__(
        self, process: StageProcess, number: int, function: Callable[[], Any], weight: float, inputs: Any
    ) -> None:
        self._process = process
        self._number = number
        self._function = function
        self._weight = weight
        self._inputs = inputs
        self._flight: Flight | None = None
        self._versions: list[int] = []

    def forward(self, stage: int) -> None:
        """Receive, compute, send."""
        process = self._process
        message = process.link.receive(Operation("F", stage, self._number)) if stage else None
        with process.saved.hooks(process.stage.version) if process.saved else nullcontext():
            self._flight = process.ghosts.forward(self._function, message, process.seed(self._number), self._inputs)
        self._versions = versions_of(process.stage.parameters)
        if self._flight.outgoing is not None:
            process.link.send(Operation("F", stage + 1, self._number), self._flight.outgoing)

    def backward(self, stage: int) -> None:
        """Receive, compute, send."""
        process, flight = self._process, self._flight
        assert flight is not None
        gradients = None if process.is_last else process.link.receive(Operation("B", stage, self._number))
        weight = None
        if process.is_last and isinstance(flight.result, Tensor):
            weight = torch.full_like(flight.result, self._weight)
        parameters = process.stage.parameters
        weights = current_weights(parameters, self._versions) if process.delayed else nullcontext()
        with weights, own_pending_errors(parameters):
            back = process.ghosts.backward(flight, gradients, weight)
        self._flight = None
        if back is not None:
            process.link.send(Operation("B", stage - 1, self._number), back)

    def abort(self) -> None:
        """What is under way cannot be called back: a run that failed ends with its processes."""
