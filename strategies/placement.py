"""Where the stages run: all of them in this process, or each in its own."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Protocol
from zlib import crc32

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.optim import Optimizer

from aimc_pl.analog import is_analog
from aimc_pl.distributed import Link
from aimc_pl.flight import Flight, StagedStep
from aimc_pl.ghosts import Exchange, Ghosts, gradients_known, loss_of
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
    """What differs between one process and several."""

    is_apart: bool
    """Whether every stage runs in a process of its own."""

    @property
    def holds_last(self) -> bool:
        """Whether the last stage, which knows the loss, is here."""
        ...

    def agree(self, value: Any) -> Any:
        """What the first process has measured, in all of them."""
        ...

    def place(self, step: StagedStep, optimizers: Sequence[Optimizer]) -> Sequence[Stage]:
        """Start with the stages of this process, which are returned."""
        ...

    def running(self) -> AbstractContextManager[Any]:
        """Entered while micro-batches run."""
        ...

    def microbatch(self, step: TrainingStep) -> MicroBatch:
        """A micro-batch for the pipeline."""
        ...

    def result(self, output: Any, is_async: bool) -> Any:
        """What Lightning is to take for training_step's result."""
        ...

    def gradients_known(self) -> AbstractContextManager[None]:
        """Entered while hooks may compute with the gradients of all stages."""
        ...

    def evaluate(self, function: Callable[[], Any], inputs: Any) -> Any:
        """Run a step of validation, test or predict on a whole batch."""
        ...

    def module_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of the whole module."""
        ...

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """The state of the whole optimizer; ``None`` if it is that of this process's."""
        ...

    def draws(self) -> dict[str, int]:
        """What the random numbers of the next micro-batches come from, if not from the global states."""
        ...

    def end(self) -> None:
        """Leave this process with the whole trained module."""
        ...


class OneProcess:
    """All stages are here, simulated clock by clock."""

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
    """One stage is here. Other stages' weights are given up while training.

    Args:
        strategy: connects the processes.
        module: whole.
        frees: whether to give up what other stages train.
        split_at: names of the modules with which stages 1 … M−1 begin, if they are known.
        draws: what :meth:`draws` gave when a checkpoint was made, to go on from.
    """

    is_apart = True

    def __init__(
        self,
        strategy: ProcessStrategy,
        module: "pl.LightningModule",
        frees: bool,
        split_at: Sequence[str] | None,
        draws: Mapping[str, int],
    ) -> None:
        self._strategy = strategy
        self._module = module
        self._frees = frees
        self._split_at = split_at
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
        # What a stage draws must not change what the processes' samplers draw alike.
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
        return self._process.microbatch(function, step.weight, step.inputs)

    def result(self, output: Any, is_async: bool) -> Any:
        """See :class:`Placement`."""
        if self.holds_last:
            return output
        # The loss is not known here, and Lightning updates for a loss only.
        return None if is_async else loss_of(self._num_stages - 1, self._strategy.root_device)

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
                # Where training_step will begin its stages is not known yet.
                return function()
            if self._process is None:
                with patched((self._module, "log", discard)):
                    step = settle_evaluation(
                        self._module, function, inputs, self._num_stages, self._split_at, self.agree
                    )
                self.place(step, [])
            assert self._process is not None
            self._announce(self._process)
            with logging_after(self._module), self._process.ghosts.intercepting():
                return self._process.infer(function, inputs)

    def _announce(self, process: StageProcess) -> None:
        """Have the other processes compare what they have read."""
        process.link.announce(self._strategy.fingerprint, batch_name(self._module.trainer))

    def module_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """See :class:`Placement`."""
        if self._ownership is None:
            return state
        return self._ownership.merge_state(state, self._stage, self._strategy.gather)

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
