"""The class in this module runs the mini-batches of a fit through the pipeline.

It hands their gradients to Lightning, or to the updates of the stages.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from aimc_pl.analog import PendingUpdates, drop_left_out, is_analog, reset_pending_updates
from aimc_pl.arguments import check_number
from aimc_pl.boundaries import Calls, find
from aimc_pl.cost import Hardware, Work, count_work
from aimc_pl.pipeline import MicroBatch, Observer, Pipeline
from aimc_pl.stage import Stage
from aimc_pl.strategies.batches import Batches
from aimc_pl.strategies.checks import too_few_samples
from aimc_pl.strategies.logbook import Logbook, discard, logging_to
from aimc_pl.strategies.number_check import NumberCheck
from aimc_pl.strategies.placement import Placement
from aimc_pl.strategies.planning import settle, trials_of
from aimc_pl.strategies.private_lightning import (
    is_step_hooked,
    last_batch_before_look,
    logging_in,
    prepare_step,
    without_loggers,
)
from aimc_pl.strategies.settings import Settings
from aimc_pl.strategies.stage_optimizer import StageOptimizer
from aimc_pl.strategies.training_step import TrainingStep, merge_outputs


class Training:
    """The training of a fit, which runs mini-batches through a pipeline. The first mini-batch builds the pipeline.

    Args:
        module: the module to train.
        settings: the arguments of the strategy.
        placement: runs the stages, in this process or in several.
        observers: objects that are told of every operation of the pipeline.
        split_at: names of the modules with which stages 1 … M−1 begin. They override those in the settings.
        counters: what :meth:`counters` returned when a checkpoint was made. The counts continue from there.
    """

    def __init__(
        self,
        module: "pl.LightningModule",
        settings: Settings,
        placement: Placement,
        observers: Sequence[Observer],
        split_at: Sequence[str] | None,
        counters: Mapping[str, int],
    ) -> None:
        self.pipeline: Pipeline | None = None
        self.batches = Batches(module, settings)
        self.split_at = split_at
        self.is_cut_off = False
        """Whether an error has ended a mini-batch after which some stages may have been updated, and others not."""
        self.rate_factor = 1.0
        """The factor of the learning rate in the newest update."""
        self._module = module
        self._settings = settings
        self._placement = placement
        self._observers = observers
        self._counters = counters
        self._logbook = Logbook()
        self._steps: list[TrainingStep] = []
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self._errors = PendingUpdates()
        """What the last mini-batch has left for tiles, kept apart as its gradients are."""
        self._partial: list[tuple[nn.Parameter, Tensor]] = []
        """Gradients to which more micro-batches will add before the stage updates."""
        self._partial_errors = PendingUpdates()
        """The same for tiles."""
        self._optimizer: StageOptimizer | None = None
        self._number_check = NumberCheck(
            module, settings.on_nonfinite, None if placement.is_apart else self._running_again
        )
        self._num_learnt = 0
        """The number of micro-batches up to the last update of all stages."""
        self._is_hooked = True
        """Whether hooks run between a backward and the step of the optimizer."""
        reset_pending_updates(module)

    def run(self, batch: Any, args: tuple[Any, ...]) -> Any:
        """Run one mini-batch, and return what Lightning takes as the result of training_step.

        The result merges the outputs of the micro-batches that have gone through all stages since the last mini-batch.
        """
        in_sync = any(each.runs_in_sync(self._trainer.global_step) for each in self._settings.remedies)
        steps = self.batches.steps(batch, args, self._precision.train_step_context, in_sync)
        for number, step in enumerate(steps, self.counters()["num_entered"]):
            step.number = number
        if self._placement.holds_last:
            self._steps += steps
        if self.pipeline is None:
            self.pipeline = self._begin(steps, batch, args)
            self._num_learnt = self.counters()["num_entered"]
        with self._running():
            if self.pipeline is None:
                for step in steps:
                    step()
            else:
                self._run(self.pipeline, [self._placement.microbatch(step) for step in steps], in_sync)
            finished = self._take_finished()
        self._write_log()
        output = merge_outputs(finished, self._settings.loss_reduction)
        result = self._placement.result(output, self._settings.schedule.is_async)
        if result is None and not self._settings.schedule.is_async:
            self.backward()  # all micro-batches are skipped, and Lightning then asks for no backward
        return result

    def backward(self) -> None:
        """Add the gradients of the last mini-batch to the parameters.

        Under a schedule with all forwards first, the backwards run in this method. Otherwise they have run already, and
        their gradients were kept apart.
        """
        if self.pipeline is not None and not self.pipeline.is_empty:
            with self._running():
                self.pipeline.drain()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._gradients = []
        # Pulses depend on the order: what earlier mini-batches have accumulated comes first.
        accumulated = PendingUpdates(self._learning())
        self._errors.give_back()
        accumulated.give_back()

    def check_gradients(self) -> None:
        """Check, before an update of all stages, that the gradients are finite. If not, end the run or warn.

        Raises:
            UsageError: if a gradient is not finite.
        """
        if self.pipeline is None:
            return
        clock, first, last = self.pipeline.clock, self._num_learnt, self.pipeline.num_entered - 1
        which = f"micro-batch {last}" if first == last else f"micro-batches {first} to {last}"
        for stage in reversed(self.pipeline.stages):
            self._number_check.check_gradients(stage, clock, which, [])
        self._num_learnt = last + 1

    def watch_tiles(self) -> None:
        """Warn about analog layers at the bounds of their devices, and about those whose pulse trains are too short."""
        self._number_check.watch_tiles()

    def current_gradients(self, microbatch: Any, batch_idx: int, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the gradients that some parameters have for a micro-batch if all stages use their current weights."""
        step = self.batches.whole(microbatch, self._step_args(batch_idx), self._precision.train_step_context)
        with logging_to(self._module, discard):
            return trials_of(self._module, [step]).gradients(parameters)

    def count_work(self, batch: Any, batch_idx: int, hardware: Hardware) -> list[Work]:
        """Return what each stage does for the first micro-batch of a mini-batch.

        Stages that are not chosen yet are balanced by their modelled time on ``hardware``.
        """
        microbatch = self.batches.split(batch)[0]
        step = self.batches.whole(microbatch, self._step_args(batch_idx), self._precision.train_step_context)
        with logging_to(self._module, discard), without_loggers(self._trainer):
            trials, calls = trials_of(self._module, [step], microbatch), Calls()
            split_at, schedule = self.split_at, self._settings.schedule
            if split_at is None:
                trials.undivided(calls.recorded(self._module))
                may_share = not (schedule.is_async or self._placement.is_apart)
                split_at, _ = find(trials, calls, schedule.num_stages, may_share=may_share, hardware=hardware)
            with trials.fresh():
                return count_work(self._module, step, split_at, int(hardware.tile_size.value))

    def counters(self) -> dict[str, int]:
        """Return the numbers of clocks and of micro-batches of the pipeline so far."""
        if self.pipeline is None:
            return {"clock": 0, "num_entered": 0, **self._counters}
        return {"clock": self.pipeline.clock, "num_entered": self.pipeline.num_entered}

    def drain(self) -> None:
        """Finish the micro-batches in flight, including their updates."""
        if self.pipeline is None or self.pipeline.is_empty:
            return
        with self._running():
            self.pipeline.drain()
            self._take_finished()
        if self._trainer.training:
            with logging_in(self._module, "training_step"):
                self._write_log()
        self._logbook = Logbook()

    def abandon(self) -> None:
        """Drop the micro-batches in flight after an error, and what they have left for later updates."""
        self._steps = []
        self._partial = []
        self._partial_errors = PendingUpdates()
        self._gradients, self._errors = [], PendingUpdates()
        self._logbook = Logbook()
        if self.pipeline is not None:
            self.pipeline.abandon()
            reset_pending_updates(self._module)

    def _step_args(self, batch_idx: int) -> tuple[Any, ...]:
        takes_index = is_param_in_hook_signature(self._module.training_step, "batch_idx", min_args=2)
        return (batch_idx,) if takes_index else ()

    @property
    def _trainer(self) -> "pl.Trainer":
        return self._module.trainer

    @property
    def _precision(self) -> Any:
        return self._trainer.precision_plugin

    def _begin(self, steps: Sequence[TrainingStep], batch: Any, args: tuple[Any, ...]) -> Pipeline | None:
        schedule = self._settings.schedule
        # A resumed fit may begin with the last mini-batch of an epoch, which may be smaller than the others.
        if len(steps) < schedule.num_microbatches and not self.counters()["num_entered"]:
            raise too_few_samples(self.batches.size(batch), schedule.num_microbatches)
        trained = self._trained_besides()
        gradients = [tensor.grad for tensor in trained]
        with logging_to(self._module, discard), without_loggers(self._trainer):
            step = settle(
                self._module,
                steps,
                self.batches.whole(batch, args, self._precision.train_step_context),
                self.batches.half(batch, args, self._precision.train_step_context),
                self._settings,
                self.split_at,
                splits_by_sample=self.batches.splits_by_sample,
                trained=trained,
                apart=self._placement.is_apart,
                agree=self._placement.agree,
            )
        for tensor, gradient in zip(trained, gradients, strict=True):
            tensor.grad = gradient
        for microbatch in steps:
            microbatch.start_anew()
        if step is None:
            if schedule.is_async:  # under other schedules Lightning warns
                rank_zero_warn("training_step returns no loss for this mini-batch, so nothing is updated: return it")
            return None
        self.split_at = [*step.boundaries]
        stages = self._number_check.stages = self._placement.place(step, self._trainer.optimizers)
        return Pipeline(stages, schedule, self._update, self._observers, **self.counters())

    def _trained_besides(self) -> list[Any]:
        """Return what the optimizer trains besides the module's parameters: plain tensors, and modules in lists."""
        known = set(map(id, self._module.parameters()))
        groups = [group for optimizer in self._trainer.optimizers for group in optimizer.param_groups]
        return [tensor for group in groups for tensor in group["params"] if id(tensor) not in known]

    def _learning(self) -> list[Any]:
        """Return the module's parameters, and what the optimizer trains besides."""
        return [*self._module.parameters(), *self._trained_besides()]

    def _run(self, pipeline: Pipeline, microbatches: Sequence[MicroBatch], in_sync: bool) -> None:
        if pipeline.schedule.is_async:
            self._is_hooked = is_step_hooked(self._trainer)
            pipeline.run(microbatches, in_sync)
            if last_batch_before_look(self._trainer):
                pipeline.drain()
        elif pipeline.schedule.forwards_first:
            pipeline.run_forwards(microbatches)
        else:
            with self._gradients_kept_apart():
                pipeline.run(microbatches)

    def _update(self, stage: Stage) -> None:
        """Update one stage in the order of Lightning: the hooks and the clipping, the step, then ``zero_grad``."""
        trainer, module = self._trainer, self._module
        assert self.pipeline is not None
        if self._optimizer is None:
            self._optimizer = StageOptimizer(trainer.optimizers[0], self.pipeline.stages)
        optimizer = self._optimizer.optimizer
        with self._optimizer.restricted_to(stage):
            if self._is_hooked:
                prepare_step(trainer, optimizer)
            which = f"micro-batch {self.pipeline.last_microbatch(stage)}"
            finished = [step for step in self._steps if step.is_finished]
            self._number_check.check_gradients(stage, self.pipeline.clock, which, finished)
            self._number_check.watch_growth(stage)
            staleness = self.pipeline.staleness(stage)
            self.rate_factor = self._rate_factor(staleness)
            self._optimizer.step(self.rate_factor, staleness)
            module.optimizer_zero_grad(trainer.current_epoch, trainer.fit_loop.batch_idx, optimizer)

    def _rate_factor(self, staleness: int) -> float:
        factors = []
        for remedy in self._settings.remedies:
            factors.append(remedy.rate_factor(staleness, self._trainer.global_step))
            check_number(f"the result of {type(remedy).__name__}.rate_factor", factors[-1], at_least=0)
        return prod(factors)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Context manager in which the boundaries of training_step open stages, and logged values enter the logbook.

        An error inside of it gives up all micro-batches in flight.
        """
        with (
            logging_to(self._module, self._record if self._placement.holds_last else discard),
            self._placement.running(),
        ):
            try:
                with self._partial_gradients():
                    yield
                drop_left_out(self._module, self._trainer.optimizers)
            except BaseException:
                self.is_cut_off = self._settings.schedule.is_async
                self.abandon()
                raise

    @contextmanager
    def _partial_gradients(self) -> Iterator[None]:
        """Context manager that keeps gradients without an update yet, which Lightning clears after each mini-batch."""
        for parameter, gradient in self._partial:
            parameter.grad = gradient
        self._partial = []
        self._partial_errors.give_back()
        yield
        if self.pipeline is not None and self.pipeline.running.accumulate > 1:
            parameters = [p for stage in self.pipeline.stages for p in stage.parameters if not is_analog(p)]
            self._partial = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
            for parameter, _ in self._partial:
                parameter.grad = None
            drop_left_out(self._module, self._trainer.optimizers)
            self._partial_errors = PendingUpdates(self._learning())

    @contextmanager
    def _gradients_kept_apart(self) -> Iterator[None]:
        """Context manager that keeps the gradients of a mini-batch until Lightning asks for them.

        Here the backwards run within training_step, after which Lightning clears all gradients.
        """
        parameters = [p for p in self._learning() if not is_analog(p)]
        accumulated = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        accumulated_errors = PendingUpdates(self._learning())
        yield
        drop_left_out(self._module, self._trainer.optimizers)
        self._errors = PendingUpdates(self._learning())
        accumulated_errors.give_back()
        self._gradients = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        for parameter, gradient in zip(parameters, accumulated, strict=True):
            parameter.grad = gradient

    def _record(self, *args: Any, **kwargs: Any) -> None:
        # The logbook is looked up here, because a micro-batch that goes on later must use the logbook of that time.
        self._logbook.record(*args, **kwargs)

    def _write_log(self) -> None:
        if self._placement.holds_last:
            with self._precision.train_step_context():
                self._logbook.write(self._module.log)
        self._logbook = Logbook()

    def _take_finished(self) -> list[TrainingStep]:
        finished = [step for step in self._steps if step.is_finished]
        self._steps = [step for step in self._steps if not step.is_finished]
        if self.pipeline is not None:
            self._number_check.check_losses(finished, self.pipeline.clock)
        return finished

    @contextmanager
    def _running_again(self) -> Iterator[None]:
        """Context manager in which a micro-batch may run once more, undivided, without leaving a trace."""
        with logging_to(self._module, discard), trials_of(self._module, []).fresh(), torch.no_grad():
            yield
