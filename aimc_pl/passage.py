"""This module runs an unmodified training step with one process per stage (see :mod:`aimc_pl.ghosts`)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from aimc_pl.analog import images_of_another_size, known_images, own_pending_errors
from aimc_pl.distributed import Link
from aimc_pl.ghosts import Flight, Ghosts
from aimc_pl.private_torch import versions_of
from aimc_pl.saved import SavedParameters, current_weights
from aimc_pl.schedule import Operation
from aimc_pl.stage import Stage


class StageProcess:
    """The stage of this process, with everything that its micro-batches share.

    Args:
        ghosts: the object that runs the stage.
        link: the connection to the stages before and after.
        stage: the stage of this process.
        num_stages: M, the number of stages.
        delayed: whether weights may change between a micro-batch's forward and its backward; see
            :class:`aimc_pl.flight.StagedStep`.
        saved: the hooks that replace what autograd saves of parameters; ``None`` if autograd's own references will do.
        seed: the seed of the random numbers that micro-batches draw, the same in all processes.
        count: the number of micro-batches and evaluation batches so far.
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
        self.under_way = 0
        """The number of micro-batches between their forward and their backward."""

    def microbatch(self, function: Callable[[], Any], weight: float, inputs: Any) -> "Passage":
        """Return a micro-batch for the pipeline.

        Args:
            function: the step. It returns the loss, or ``None`` to skip learning from this micro-batch.
            weight: the factor with which the loss counts in the gradient.
            inputs: the data of the micro-batch.
        """
        return Passage(self, self._next(), function, weight, inputs)

    def infer(self, function: Callable[[], Any], inputs: Any) -> Any:
        """Run the forward of a step. Return its result in the process of the last stage, and ``None`` in the others."""
        number, index = self._next(), self.stage.index
        message = self.link.receive(Operation("F", index, number)) if index else None
        flight = self.ghosts.infer(function, message, self.seed(number), inputs)
        if flight.outgoing is not None:
            self.link.send(Operation("F", index + 1, number), flight.outgoing)
        return flight.result

    def seed(self, number: int) -> int:
        """Return the seed of the random numbers that micro-batch ``number`` draws."""
        return int.from_bytes(blake2b(f"{self._seed} {number}".encode(), digest_size=8).digest())

    @contextmanager
    def checking_images(self) -> Iterator[None]:
        """Context manager that checks that a micro-batch before which others are under way changes no size of images.

        Raises:
            UsageError: at the end, if it has. The message names the tile.
        """
        before = {parameter: known_images(parameter) for parameter in self.stage.parameters if self.under_way}
        yield
        for parameter, known in before.items():
            if known and known_images(parameter) is not known:
                raise images_of_another_size(self.ghosts.name_of(parameter).removesuffix(".analog_ctx"))

    def _next(self) -> int:
        self.count += 1
        return self.count


class Passage:
    """A micro-batch at the stage of this process. The pipeline sees it as a :class:`aimc_pl.pipeline.MicroBatch`."""

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
        """Receive values from the stage before, run the forward of this stage, and send values on."""
        process = self._process
        message = process.link.receive(Operation("F", stage, self._number)) if stage else None
        saving = process.saved.hooks(process.stage.version) if process.saved else nullcontext()
        with saving, process.checking_images():
            self._flight = process.ghosts.forward(self._function, message, process.seed(self._number), self._inputs)
        process.under_way += 1
        self._versions = versions_of(process.stage.parameters)
        if self._flight.outgoing is not None:
            process.link.send(Operation("F", stage + 1, self._number), self._flight.outgoing)

    def backward(self, stage: int) -> None:
        """Receive gradients from the next stage, run the backward of this stage, and send gradients back."""
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
        process.under_way -= 1
        if back is not None:
            process.link.send(Operation("B", stage - 1, self._number), back)

    def abort(self) -> None:
        """Do nothing. What is under way cannot be called back, and a run that failed ends with its processes."""
