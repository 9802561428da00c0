"""The classes in this module run the stages: all of them in this process, or each in a process of its own."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Protocol
from zlib import crc32

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.optim import Optimizer

from aimc_pl.analog import is_analog
from aimc_pl.cost import Hardware
from aimc_pl.distributed import Link
from aimc_pl.flight import Flight, StagedStep
from aimc_pl.ghosts import Exchange, Ghosts, gradients_known, is_ghost, loss_of
from aimc_pl.passage import StageProcess
from aimc_pl.patches import patched
from aimc_pl.pipeline import MicroBatch
from aimc_pl.processes import rank_of
from aimc_pl.stage import Stage
from aimc_pl.strategies.checks import check_parameters
from aimc_pl.strategies.logbook import discard, logging_after
from aimc_pl.strategies.ownership import Ownership
from aimc_pl.strategies.planning import settle_evaluation
from aimc_pl.strategies.private_lightning import batch_name
from aimc_pl.strategies.processes import ProcessStrategy
from aimc_pl.strategies.training_step import TrainingStep


class Placement(Protocol):
    """The part of the training that differs between one process and several."""

    is_apart: bool
    """Whether every stage runs in a process of its own."""

    @property
    def holds_last(self) -> bool:
        """Whether this process has the last stage, which knows the loss."""
        ...

    def agree(self, value: Any) -> Any:
        """Return, in every process, the value that rank 0 passes to this method."""
        ...

    def place(self, step: StagedStep, optimizers: Sequence[Optimizer]) -> Sequence[Stage]:
        """Prepare this process for its stages of a divided step, and return these stages."""
        ...

    def running(self) -> AbstractContextManager[Any]:
        """Return a context manager that is entered while micro-batches run."""
        ...

    def microbatch(self, step: TrainingStep) -> MicroBatch:
        """Return a micro-batch that the pipeline can run."""
        ...

    def result(self, output: Any, is_async: bool) -> Any:
        """Return what Lightning takes as the result of training_step, given the output of this process."""
        ...

    def gradients_known(self) -> AbstractContextManager[None]:
        """Return a context manager in which hooks may compute with the gradients of all stages."""
        ...

    def evaluate(self, function: Callable[[], Any], inputs: Any) -> Any:
        """Run a step of validation, test or predict on a whole batch, and return its result."""
        ...

    def module_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state dict of the whole module, given that of this process."""
        ...

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """Return the state dict of the whole optimizer; ``None`` if the optimizer of this process has all of it."""
        ...

    def draws(self) -> dict[str, int]:
        """Return the seed and the count from which the random numbers of the next micro-batches follow.

        The result is empty if these numbers come from the global random states.
        """
        ...

    def end(self) -> None:
        """Give this process the whole trained module."""
        ...


class OneProcess:
    """All stages are in this process, which simulates them clock by clock."""

    is_apart = False
    holds_last = True

    def __init__(self) -> None:
        self._step: StagedStep | None = None

    def agree(self, value: Any) -> Any:
        """See :class:`Placement`."""
        return value

    def place(self, step: StagedStep, optimizers: Sequence[Optimizer]) -> Sequence[Stage]:
        """See :class:`Placement`."""
        self._step = step
        return step.stages

    def running(self) -> AbstractContextManager[Any]:
        """See :class:`Placement`."""
        return nullcontext() if self._step is None else self._step.running()

    def microbatch(self, step: TrainingStep) -> MicroBatch:
        """See :class:`Placement`."""
        assert self._step is not None
        return Flight(self._step, step, step.weight)

    def result(self, output: Any, is_async: bool) -> Any:
        """See :class:`Placement`."""
        return output

    def gradients_known(self) -> AbstractContextManager[None]:
        """See :class:`Placement`."""
        return nullcontext()

    def evaluate(self, function: Callable[[], Any], inputs: Any) -> Any:
        """See :class:`Placement`."""
        return function()

    def module_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """See :class:`Placement`."""
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """See :class:`Placement`."""
        return None

    def draws(self) -> dict[str, int]:
        """See :class:`Placement`."""
        return {}

    def end(self) -> None:
        """See :class:`Placement`."""


class StagePerProcess:
    """One stage is in this process. The weights of other stages are given up during training.

    Args:
        strategy: the strategy, which connects the processes.
        module: the whole module.
        frees: whether to free the memory of the parameters and the optimizer state of other stages.
        split_at: the names of the modules with which stages 1 … M−1 begin; ``None`` if they are not known yet.
        draws: what :meth:`draws` returned when a checkpoint was made. The random numbers continue from there.
        hardware: the hardware on which times are modelled to choose stages; ``None`` to measure them.
    """

    is_apart = True

    def __init__(
        self,
        strategy: ProcessStrategy,
        module: "pl.LightningModule",
        frees: bool,
        split_at: Sequence[str] | None,
        draws: Mapping[str, int],
        hardware: Hardware | None = None,
    ) -> None:
        self._strategy = strategy
        self._module = module
        self._frees = frees
        self._split_at = split_at
        self._hardware = hardware
        self._num_stages = strategy.num_stages
        self._stage = rank_of(strategy.global_rank, self._num_stages)
        self._draws = {"seed": crc32(torch.get_rng_state().numpy().tobytes()), "count": 0, **draws}
        self._ownership: Ownership | None = None
        self._process: StageProcess | None = None

    @property
    def holds_last(self) -> bool:
        """See :class:`Placement`."""
        return self._stage == self._num_stages - 1

    def agree(self, value: Any) -> Any:
        """See :class:`Placement`."""
        return self._strategy.broadcast(value)

    def place(self, step: StagedStep, optimizers: Sequence[Optimizer]) -> Sequence[Stage]:
        """See :class:`Placement`."""
        strategy, device = self._strategy, self._strategy.root_device
        check_parameters(self._module, optimizers)
        self._ownership = Ownership(self._module, step.stages)
        own = step.stages[self._stage]
        own.parameters = [p for p in self._module.parameters() if self._ownership.stage_of(p) == self._stage]
        ghosts = Ghosts(self._module, step.boundaries, self._stage, self._ownership.owners, device)
        assert strategy.processes is not None
        link = Link(strategy.processes, device)
        strategy.processes.timeout = strategy.timeout
        self._process = StageProcess(
            ghosts, link, own, self._num_stages, delayed=step.delayed, saved=step.saved, **self._draws
        )
        if self._frees:
            ghosts.free()
            mine = set(map(id, own.parameters))
            for optimizer in optimizers:
                for parameter in [parameter for parameter in optimizer.state if id(parameter) not in mine]:
                    del optimizer.state[parameter]
        return [own]

    def running(self) -> AbstractContextManager[Any]:
        """See :class:`Placement`."""
        running = ExitStack()
        # The samplers of all processes must draw the same numbers, whatever a stage draws.
        running.enter_context(isolate_rng())
        if self._process is not None:
            running.enter_context(self._process.ghosts.intercepting())
        return running

    def microbatch(self, step: TrainingStep) -> MicroBatch:
        """See :class:`Placement`."""
        assert self._process is not None
        # Only the last stage knows the loss.
        function = step if self.holds_last else step.run
        self._announce(self._process)
        return self._process.microbatch(function, step.weight, self._with_epoch(step.inputs))

    def result(self, output: Any, is_async: bool) -> Any:
        """See :class:`Placement`."""
        is_skipped = None if is_async else self.agree(output is None)
        if self.holds_last:
            return output
        # The loss is not known here, but Lightning makes an update only if it gets one.
        return None if is_async or is_skipped else loss_of(self._num_stages - 1, self._strategy.root_device)

    def gradients_known(self) -> AbstractContextManager[None]:
        """See :class:`Placement`."""
        parameters = self._module.named_parameters()
        return gradients_known(
            {name: parameter for name, parameter in parameters if not is_analog(parameter)},
            Exchange(self._stage, lambda value: self._strategy.gather(value)[::-1]),
        )

    def evaluate(self, function: Callable[[], Any], inputs: Any) -> Any:
        """See :class:`Placement`."""
        with nullcontext() if self.holds_last else patched((self._module, "log", discard)), isolate_rng():
            if self._process is None and self._module.trainer.sanity_checking:
                # It is not known yet where the stages of training_step begin.
                return function()
            if self._process is None:
                with patched((self._module, "log", discard)):
                    step = settle_evaluation(
                        self._module, function, inputs, self._num_stages, self._split_at, self.agree, self._hardware
                    )
                self.place(step, [])
            assert self._process is not None
            self._announce(self._process)
            with logging_after(self._module), self._process.ghosts.intercepting():
                return self._process.infer(function, self._with_epoch(inputs))

    def _with_epoch(self, inputs: Any) -> Any:
        """Return a batch and the number of the epoch, by which a step may decide what it computes."""
        return inputs, self._module.trainer.current_epoch

    def _announce(self, process: StageProcess) -> None:
        """Announce the batch that has been read, for the other processes to compare it with their own."""
        process.link.announce(self._strategy.fingerprint, batch_name(self._module.trainer))

    def module_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """See :class:`Placement`."""
        if self._ownership is None:
            return state
        written = {name: buffer.stage for name, buffer in self._module.named_buffers() if is_ghost(buffer)}
        return self._ownership.merge_state(state, self._stage, self._strategy.gather, written)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """See :class:`Placement`."""
        if self._ownership is None:
            return None
        return self._ownership.merge_optimizer(optimizer, self._stage, self._strategy.gather)

    def draws(self) -> dict[str, int]:
        """See :class:`Placement`."""
        return self._draws if self._process is None else self._draws | {"count": self._process.count}

    def end(self) -> None:
        """See :class:`Placement`."""
        if self._frees and self._process is not None:
            state = self.module_state(self._module.state_dict())
            self._process.ghosts.restore({})
            self._module.load_state_dict(state)
            self._frees = False
