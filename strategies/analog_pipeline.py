"""This module holds the strategy: its arguments, and Lightning's hooks in the order in which they are called."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args, override

import lightning.pytorch as pl
from lightning.pytorch.plugins import AsyncCheckpointIO, CheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from aimc_pl.arguments import check_number
from aimc_pl.cost import RASCH_2024, Hardware, Work
from aimc_pl.errors import UsageError
from aimc_pl.pipeline import Observer, Pipeline
from aimc_pl.private_torch import count_as_stepped
from aimc_pl.schedule import Duplex, Schedule, ScheduleName
from aimc_pl.strategies import analog_parts
from aimc_pl.strategies.checkpoint_io import SealedCheckpointIO
from aimc_pl.strategies.checks import (
    check_analog_callbacks,
    check_callbacks_of_processes,
    check_closure,
    check_module,
    check_split,
    check_updates,
    one_optimizer,
    warn_about_other_package,
)
from aimc_pl.strategies.draining import DrainFirst
from aimc_pl.strategies.loading import loading_weights
from aimc_pl.strategies.number_check import check_finite
from aimc_pl.strategies.placement import OneProcess, Placement, StagePerProcess
from aimc_pl.strategies.private_lightning import (
    callbacks_of,
    evaluate_without_inference_mode,
    hooks_before_step_inside,
)
from aimc_pl.strategies.processes import ProcessStrategy
from aimc_pl.strategies.remedies import Remedy
from aimc_pl.strategies.resuming import Resuming
from aimc_pl.strategies.settings import (
    GradientScale,
    LossReduction,
    OnNonfinite,
    Settings,
    make_schedule,
    with_remedies,
)
from aimc_pl.strategies.training import Training

# Digital training works without aihwkit, which this import needs.
if TYPE_CHECKING:
    from aimc_pl.devices import DeviceSpec

_CHECKPOINT_KEY = "aimc_pl"


class AnalogPipelineStrategy(ProcessStrategy):
    """Train an unmodified LightningModule on a pipeline of analog in-memory computing accelerators.

    The strategy divides ``training_step`` into stages, one for each accelerator. A stage begins where the step calls a
    certain module. Every mini-batch is split into micro-batches, and the unmodified step runs once for each of them.
    The schedule decides when each micro-batch passes through each stage. Validation, test and predict run whole
    batches.

    With ``Trainer(devices=1)`` one process simulates all stages, clock cycle by clock cycle. With
    ``devices=num_stages`` (over all nodes) every stage runs in a process of its own, and rank 0 holds the last stage.

    Args:
        num_stages: M, the number of accelerators.
        schedule: ``"none"`` (no pipeline), ``"sync"`` (fill-drain), ``"1f1b"`` (the updates and clock cycles of
            ``"sync"`` with fewer activations in flight), ``"zero_bubble"`` (the updates of ``"sync"``; the gradients of
            weights fill idle clocks) or ``"async"`` (every stage updates after each micro-batch, with stale weights and
            without weight stashing). A class or a function also works, if it takes M and B and returns a
            :class:`~aimc_pl.schedule.Schedule`.
        num_microbatches: B, the number of micro-batches of a mini-batch.
        device: the analog device of the module's Linear and Conv layers: a name that ``aimc-pl devices`` lists, or an
            aihwkit RPUConfig. A mapping chooses a device per layer. Its keys are patterns of layer names, or stage
            numbers (with ``split_at``); the last match wins; the value ``None`` keeps a layer digital. By default no
            layer is changed.
        split_at: names of the modules that open stages 1 … M−1, relative to the LightningModule, such as
            ``"net.layers.2"``. By default the strategy measures the time of forward, backward and update of the layers,
            divides it evenly, and prints the names that it has chosen. ``"cost"`` models these times on the hardware
            ``rasch_2024`` (see :mod:`aimc_pl.cost`) instead, so that the stages are the same on every machine.
        duplex: what a stage can do in one clock of ``"async"``: one operation (``"half"``), or a forward and a backward
            (``"full"``).
        gradient_scale: ``"minibatch"`` weights the loss of a micro-batch by its share of the mini-batch's samples.
            ``"microbatch"`` (``"async"`` only) makes the update of every micro-batch a full step.
        weight_stashing: whether the backward uses the weights of the forward, as PipeDream does (``"async"`` and
            digital networks only).
        loss_reduction: how the loss of training_step reduces over samples: ``"mean"`` or ``"sum"``.
        microbatch_weight: a function that takes a micro-batch and returns the number of items over which its loss is a
            mean, if these are not its samples. An example is the number of unmasked tokens.
        split_batch: a function that takes a mini-batch and B, and returns at most B micro-batches. A method of this
            name on the LightningModule does the same. By default all tensors are split along their first dimension.
        verify: whether to compare, once before the first update, the result of the stages with an undivided run of
            training_step.
        on_nonfinite: what happens before a loss or gradient that is not finite reaches the weights: the run ends
            (``"stop"``), or the first one is warned about (``"warn"``).
        remedies: what is done against the cost of stale weights (``"async"`` only): objects of the classes in
            :mod:`aimc_pl.strategies.remedies`, at most one of each.
        analog_lr_scale: the learning rate of layers that learn by pulses, in units of the optimizer's. Typical rates of
            such layers are 0.05 to 0.5, whatever the optimizer of the digital parameters needs.
        timeout: seconds after which a process that does not answer is considered lost, which ends the run; above 0 and
            at most 10⁹.
        start_timeout: the same limit until the first mini-batch, while the processes start.

    Raises:
        UsageError: if an argument is out of range, or if some arguments exclude each other.
    """

    strategy_name = "aimc_pipeline"

    def __init__(
        self,
        num_stages: int = 4,
        schedule: ScheduleName | Callable[[int, int], Schedule] = "async",
        num_microbatches: int = 4,
        device: "DeviceSpec" = None,
        split_at: Sequence[str] | Literal["cost"] | None = None,
        duplex: Duplex = "half",
        gradient_scale: GradientScale = "minibatch",
        weight_stashing: bool = False,
        loss_reduction: LossReduction = "mean",
        microbatch_weight: Callable[[Any], float] | None = None,
        split_batch: Callable[[Any, int], Sequence[Any]] | None = None,
        verify: bool = True,
        on_nonfinite: OnNonfinite = "stop",
        remedies: Sequence[Remedy] = (),
        analog_lr_scale: float = 1.0,
        timeout: float = 60.0,
        start_timeout: float = 600.0,
    ) -> None:
        super().__init__(num_stages, timeout, start_timeout)
        self.checkpoint_io = SealedCheckpointIO()
        warn_about_other_package()
        self.schedule = with_remedies(make_schedule(schedule, num_stages, num_microbatches, duplex), remedies)
        self.settings = Settings(
            self.schedule,
            None if split_at == "cost" else split_at,
            gradient_scale,
            weight_stashing,
            loss_reduction,
            microbatch_weight,
            split_batch,
            verify,
            on_nonfinite,
            remedies,
            RASCH_2024 if split_at == "cost" else None,
        )
        self.device = device
        check_number("analog_lr_scale", analog_lr_scale, above=0)
        self.analog_lr_scale = analog_lr_scale
        self.observers: list[Observer] = []
        """The observers of the pipeline. Callbacks may append themselves at any time, even during a fit."""
        self._training: Training | None = None
        self._placement: Placement = OneProcess()
        self._is_stepping = False
        self._resuming = Resuming()
        self._resumed: dict[str, Any] = {}

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        for schedule in get_args(ScheduleName):
            strategy_registry.register(
                f"aimc_{schedule}", cls, description=f"analog pipeline, schedule {schedule}", schedule=schedule
            )

    @property
    def pipeline(self) -> Pipeline | None:
        """The running pipeline; ``None`` before the first mini-batch of a fit."""
        return self._training.pipeline if self._training else None

    @property
    def num_entered(self) -> int:
        """The number of micro-batches that have entered the pipeline. A resumed fit goes on counting."""
        return self._training.counters()["num_entered"] if self._training else 0

    @property
    def rate_factor(self) -> float:
        """The factor of the learning rate that the remedies have set for the newest update."""
        return self._training.rate_factor if self._training else 1.0

    # ------------------------------------------------------------------ setup

    @property
    def _module(self) -> "pl.LightningModule":
        assert self.lightning_module is not None
        return self.lightning_module

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            check_module(trainer, self.schedule)
            check_split(self._module, self.settings.split_at, self.schedule.num_stages)
        if self.is_multiprocess:
            check_callbacks_of_processes(trainer)
            self.share_start(self._module)
            evaluate_without_inference_mode(trainer)
        self._convert()
        if fitting:
            check_analog_callbacks(trainer)
        super().setup(trainer)
        callbacks = callbacks_of(trainer)
        if not any(isinstance(callback, DrainFirst) for callback in callbacks):
            callbacks[:0] = [DrainFirst(self), self._resuming]
        if self.is_multiprocess:
            self.share_before_decisions(trainer, self._module)
        split_at = self.settings.split_at if self.settings.split_at is not None else self._resumed.get("split_at")
        self._placement = OneProcess()
        if self.is_multiprocess:
            draws = self._resumed.get("draws", {})
            self._placement = StagePerProcess(self, self._module, fitting, split_at, draws, self.settings.hardware)
        self._training = None
        if fitting:
            counters = self._resumed.get("counters", {})
            self._training = Training(self._module, self.settings, self._placement, self.observers, split_at, counters)

    def _convert(self) -> None:
        """Make layers analog, before a checkpoint is loaded and before the optimizer is created."""
        analog_parts.convert(self._module, self.device, self.settings, self.root_device, self.precision_plugin)

    @override
    def setup_optimizers(self, trainer: "pl.Trainer") -> None:
        with one_optimizer():
            super().setup_optimizers(trainer)
        (optimizer,) = self.optimizers
        check_updates(self._module, optimizer)
        check_closure(self._module, optimizer, stages_update_apart=self.schedule.is_async or self.is_multiprocess)
        analog_parts.convert_optimizer(self._module, optimizer, self.analog_lr_scale)
        self.optimizers = [optimizer]  # Lightning's wrapper has the methods of the class that it found
        if trainer.gradient_clip_val or is_overridden("configure_gradient_clipping", self._module, pl.LightningModule):
            analog_parts.tell_of_clipping(self._module)

    # --------------------------------------------------------------- training

    @override
    def process_dataloader(self, dataloader: object) -> object:
        if self._module.trainer.training:
            self._resuming.note_loader(dataloader, self._module)
        return dataloader

    @override
    def on_train_start(self) -> None:
        if random_states := self._resumed.pop("random_states", None):
            self._resuming.go_on(self._module.trainer, random_states, self.global_rank)

    @override
    def training_step(self, batch: Any, *args: Any) -> Any:
        assert self._training is not None
        if self.schedule.is_async and not self._is_stepping:
            raise UsageError(
                "optimizer_step calls the closure itself, and under schedule='async' the stages update within it: call "
                "optimizer.step(closure=optimizer_closure), or use schedule='sync'"
            )
        return self._training.run(batch, args)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        assert self._training is not None
        loss = self.precision_plugin.pre_backward(closure_loss, self._module)
        if self.schedule.is_async:
            # Each stage has called the hooks that follow a backward, before its update.
            return loss.detach()
        self._training.backward()
        with self._placement.gradients_known():
            return self.precision_plugin.post_backward(loss, self._module)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        if self.schedule.is_async:
            return self._update_within(closure, optimizer)
        with hooks_before_step_inside(self.precision_plugin, self._before_step):
            result = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self.pipeline is not None:
            self.pipeline.updated()
        return result

    def _update_within(self, closure: Callable[[], Any], optimizer: Optimizer) -> Any:
        """Run training_step, in which the stages update one by one."""
        with warnings.catch_warnings():
            # No micro-batch leaves the pipeline while it fills, so the first mini-batches may have no loss.
            warnings.filterwarnings("ignore", message=".*training_step.* returned `None`")
            self._is_stepping = True
            try:
                return closure()
            finally:
                self._is_stepping = False
                # Learning-rate schedulers expect a step, even if no stage has updated yet.
                count_as_stepped(optimizer)

    @contextmanager
    def _before_step(self) -> Iterator[None]:
        """Context manager for the hooks and the clipping before all stages update together."""
        with self._placement.gradients_known():
            yield
        if self._training is not None:
            self._training.check_gradients()

    def split_batch(self, batch: Any) -> list[Any]:
        """Return the micro-batches of a mini-batch."""
        assert self._training is not None
        return self._training.batches.split(batch)

    def batch_size(self, batch: Any) -> int:
        """Return the number of samples of a mini-batch."""
        assert self._training is not None
        return self._training.batches.size(batch)

    def gradients(self, microbatch: Any, batch_idx: int, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the gradients that parameters have for a micro-batch if all stages use their current weights.

        The gradients are flattened and concatenated into one vector.
        """
        assert self._training is not None
        return self._training.current_gradients(microbatch, batch_idx, parameters)

    def count_work(self, batch: Any, batch_idx: int, hardware: Hardware) -> list[Work]:
        """Return what each stage does for the first micro-batch of a mini-batch. See :mod:`aimc_pl.cost`.

        Stages that are not chosen yet are balanced by their modelled time on ``hardware``.
        """
        assert self._training is not None
        return self._training.count_work(batch, batch_idx, hardware)

    @override
    def drain(self) -> None:
        """Finish the micro-batches in flight, including their updates."""
        if self._training is not None:
            self._training.drain()
            self._training.watch_tiles()

    # ------------------------------------------------------------- evaluation

    @override
    def validation_step(self, *args: Any) -> Any:
        return self._evaluate(self._module.validation_step, self.precision_plugin.val_step_context, args)

    @override
    def test_step(self, *args: Any) -> Any:
        return self._evaluate(self._module.test_step, self.precision_plugin.test_step_context, args)

    @override
    def predict_step(self, *args: Any) -> Any:
        return self._evaluate(self._module.predict_step, self.precision_plugin.predict_step_context, args)

    def _evaluate(
        self, function: Callable[..., Any], context: Callable[[], AbstractContextManager[Any]], args: Any
    ) -> Any:
        """Run an evaluation step on a whole batch."""
        with context():
            return self._placement.evaluate(partial(function, *args), args[0])

    # ------------------------------------------------------------ checkpoints

    @ProcessStrategy.checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        """The user's plugin. One that saves in the background saves with :class:`SealedCheckpointIO`."""
        if isinstance(io, AsyncCheckpointIO):
            io.checkpoint_io = SealedCheckpointIO()
        self._checkpoint_io = io

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self.drain()
        return analog_parts.saved(self._placement.module_state(super().lightning_module_state_dict()))

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = self._placement.optimizer_state(optimizer)
        return super().optimizer_state(optimizer) if state is None else state

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self._training is not None and self._training.is_cut_off:
            rank_zero_warn(
                "the run has ended within a mini-batch, and only some stages have updated: this state is not saved as "
                f"{filepath}, and earlier checkpoints stay as they are"
            )
            return
        check_finite(self._module, checkpoint["state_dict"], checkpoint["global_step"])
        # This entry comes first, so that a program without aimc_pl fails with the name of this package.
        super().save_checkpoint({_CHECKPOINT_KEY: self._state()} | checkpoint, filepath, storage_options)

    def _state(self) -> dict[str, Any]:
        """Return what a checkpoint contains in addition to what Lightning saves."""
        state = analog_parts.seal(self._module)
        if self._training is not None:
            state |= {
                "split_at": None if self._training.split_at is None else [*self._training.split_at],
                "counters": self._training.counters(),
                "draws": self._placement.draws(),
                "random_states": self._resuming.state(self._module.trainer, self.gather),
            }
        return state

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        self._convert()
        with analog_parts.admitted_classes(self._module):
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self._resumed = dict(checkpoint.get(_CHECKPOINT_KEY, {}))
        if len(self._resumed.get("split_at") or ()) != self.schedule.num_stages - 1:
            self._resumed.pop("split_at", None)
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        analog_parts.check_devices(self._module, checkpoint["state_dict"])
        with loading_weights():
            super().load_model_state_dict(checkpoint, strict)

    # -------------------------------------------------------------------- end

    @override
    def on_train_end(self) -> None:
        """Give every process the whole trained module, as it has after any other strategy."""
        self._placement.end()

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._placement = OneProcess()
        if self._training is not None:
            self._training.abandon()
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        self._placement.end()
        # A later fit or evaluation keeps the boundaries of the stages, but nothing else of this fit.
        split_at = self._resumed.get("split_at")
        if self._training is not None:
            self._training.abandon()
            split_at = self._training.split_at
        self._resumed = {"split_at": split_at}
        super().teardown()
