"""The Lightning Strategy: its arguments, and Lightning's hooks in the order in which they are called."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, override

import lightning.pytorch as pl
from lightning.pytorch.plugins import AsyncCheckpointIO, CheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.serialization import safe_globals

from aimc_pl.analog import analog_layers, is_analog
from aimc_pl.errors import UsageError
from aimc_pl.pipeline import Observer, Pipeline
from aimc_pl.private_torch import count_as_stepped
from aimc_pl.schedule import Duplex, Schedule, ScheduleName
from aimc_pl.strategies.checkpoint_io import SealedCheckpointIO
from aimc_pl.strategies.checks import (
    check_analog_support,
    check_module,
    check_split,
    check_updates,
    evaluates_the_loss,
    warn_about_other_package,
)
from aimc_pl.strategies.draining import DrainFirst
from aimc_pl.strategies.number_check import check_finite
from aimc_pl.strategies.placement import OneProcess, Placement, StagePerProcess
from aimc_pl.strategies.private_lightning import evaluate_without_inference_mode, hooks_before_step_inside
from aimc_pl.strategies.processes import ProcessStrategy
from aimc_pl.strategies.resuming import Resuming
from aimc_pl.strategies.settings import GradientScale, LossReduction, OnNonfinite, Settings, make_schedule
from aimc_pl.strategies.training import Training

# aihwkit is imported where devices are made: a digital run does without it.
if TYPE_CHECKING:
    from aimc_pl.devices import DeviceSpec

_CHECKPOINT_KEY = "aimc_pl"


class AnalogPipelineStrategy(ProcessStrategy):
    """Trains an unmodified LightningModule on a pipeline of analog in-memory computing accelerators.

    ``training_step`` is divided into stages where it calls certain modules; every mini-batch is split into
    micro-batches, which pass through the stages as the schedule says. The step runs as it is written, once per
    micro-batch. Validation, test and predict run whole batches. With ``Trainer(devices=1)`` one process simulates all
    stages, clock by clock; with ``devices=num_stages`` (over all nodes) every stage runs in a process of its own, where
    rank 0 holds the last stage.

    Args:
        num_stages: M, the number of accelerators the network is spread over.
        schedule: ``"none"`` (no pipeline), ``"sync"`` (fill-drain), ``"1f1b"`` (the same updates and clock cycles,
            fewer activations in flight) or ``"async"`` (every stage updates after each micro-batch, with stale
            weights and without weight stashing). Or a class of your own, or a function, that makes a
            :class:`~aimc_pl.schedule.Schedule` for M stages and B micro-batches.
        num_microbatches: B, the micro-batches of one mini-batch.
        device: what the module's Linear and Conv layers become: the name of an analog device (``aimc-pl devices``
            lists them) or an aihwkit RPUConfig. A mapping chooses per layer: its keys are patterns of layer names, or
            stage numbers (with ``split_at``), the last match wins, ``None`` stays digital. ``None``: all as it is.
        split_at: names of the modules with which stages 1 … M−1 begin, relative to the LightningModule, as
            ``"net.layers.2"``. ``None`` balances the stages by the measured time of forward, backward and update, and
            says which names it took.
        duplex: of ``"async"``: ``"half"``, one operation per stage and clock, or ``"full"``, a forward and a backward.
        gradient_scale: ``"minibatch"`` weights a micro-batch's loss by its share of the mini-batch's samples, under
            every schedule; ``"microbatch"`` (``"async"`` only) makes every micro-batch's update a full step.
        weight_stashing: of ``"async"`` and digital networks: backward with the weights of the forward (PipeDream).
        loss_reduction: how the loss in training_step reduces over samples, ``"mean"`` or ``"sum"``.
        microbatch_weight: takes a micro-batch and returns what its loss is a mean over, if not samples: the number of
            unmasked tokens, for example.
        split_batch: takes a mini-batch and B, and returns at most B micro-batches; a method of that name on the
            LightningModule does the same. By default the first dimension of all tensors is split.
        verify: compare the stages with an undivided run of training_step, once, before the first update.
        on_nonfinite: whether a loss or gradient that is not finite ends the run before it reaches the weights,
            ``"stop"``, or the first one is warned about, ``"warn"``. Hooks before a step may mend gradients.
        timeout: seconds after which a process that does not answer is taken for lost, which ends the run;
            above 0, at most 10⁹.
        start_timeout: the same while the processes start, up to the first mini-batch.

    Raises:
        UsageError: if an argument is out of range, or some exclude each other.
    """

    strategy_name = "aimc_pipeline"

    def __init__(
        self,
        num_stages: int = 4,
        schedule: ScheduleName | Callable[[int, int], Schedule] = "async",
        num_microbatches: int = 4,
        device: "DeviceSpec" = None,
        split_at: Sequence[str] | None = None,
        duplex: Duplex = "half",
        gradient_scale: GradientScale = "minibatch",
        weight_stashing: bool = False,
        loss_reduction: LossReduction = "mean",
        microbatch_weight: Callable[[Any], float] | None = None,
        split_batch: Callable[[Any, int], Sequence[Any]] | None = None,
        verify: bool = True,
        on_nonfinite: OnNonfinite = "stop",
        timeout: float = 60.0,
        start_timeout: float = 600.0,
    ) -> None:
        super().__init__(num_stages, timeout, start_timeout)
        self.checkpoint_io = SealedCheckpointIO()
        warn_about_other_package()
        self.schedule = make_schedule(schedule, num_stages, num_microbatches, duplex)
        self.settings = Settings(
            self.schedule,
            split_at,
            gradient_scale,
            weight_stashing,
            loss_reduction,
            microbatch_weight,
            split_batch,
            verify,
            on_nonfinite,
        )
        self.device = device
        self.observers: list[Observer] = []
        """Told of every operation of the pipeline; callbacks append themselves, and may do so in the midst of a fit."""
        self._training: Training | None = None
        self._placement: Placement = OneProcess()
        self._is_stepping = False
        self._resuming = Resuming()
        self._resumed: dict[str, Any] = {}

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        for schedule in ("none", "sync", "async"):
            strategy_registry.register(
                f"aimc_{schedule}", cls, description=f"analog pipeline, schedule {schedule}", schedule=schedule
            )

    @property
    def pipeline(self) -> Pipeline | None:
        """The running pipeline, from the first mini-batch of a fit on."""
        return self._training.pipeline if self._training else None

    @property
    def num_entered(self) -> int:
        """Micro-batches that have entered the pipeline, those before a resumed checkpoint included."""
        return self._training.counters()["num_entered"] if self._training else 0

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
            check_split(self._module, self.settings.split_at)
        if self.is_multiprocess:
            self.share_start(self._module)
            evaluate_without_inference_mode(trainer)
        self._convert()
        super().setup(trainer)
        callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        if not any(isinstance(callback, DrainFirst) for callback in callbacks):
            callbacks[:0] = [DrainFirst(self), self._resuming]
        split_at = self.settings.split_at if self.settings.split_at is not None else self._resumed.get("split_at")
        self._placement = OneProcess()
        if self.is_multiprocess:
            draws = self._resumed.get("draws", {})
            self._placement = StagePerProcess(self, self._module, fitting, split_at, draws)
        self._training = None
        if fitting:
            counters = self._resumed.get("counters", {})
            self._training = Training(self._module, self.settings, self._placement, self.observers, split_at, counters)

    def _convert(self) -> None:
        """Make the layers analog: before a checkpoint is loaded, and before the optimizer is built."""
        if self.device is not None:
            from aimc_pl.devices import convert_to_analog, describe_layers

            if convert_to_analog(self._module, self.device, self.settings.split_at):
                rank_zero_info(describe_layers(self._module))
        if self.settings.weight_stashing and analog_layers(self._module):
            raise UsageError("weight_stashing is for digital networks: a crossbar cannot keep a second set of weights")
        check_analog_support(self._module, self.root_device, self.precision_plugin)

    @override
    def setup_optimizers(self, trainer: "pl.Trainer") -> None:
        try:
            super().setup_optimizers(trainer)
        except RuntimeError as error:
            # Lightning's advice, manual optimization, is none here.
            if "multiple optimizers" not in str(error):
                raise
            raise UsageError(
                "the pipeline trains with one optimizer, and configure_optimizers returns several: "
                "return one with several parameter groups"
            ) from error
        check_updates(self._module, self.optimizers[0])
        step = signature(type(self.optimizers[0]).step).parameters
        stands_apart = self.schedule.is_async or self.is_multiprocess
        if stands_apart and "closure" in step and step["closure"].default is Parameter.empty:
            raise evaluates_the_loss(self.optimizers[0])
        if any(map(is_analog, self._module.parameters())):
            from aimc_pl.devices import make_analog_aware

            make_analog_aware(self.optimizers[0])

    # --------------------------------------------------------------- training

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
            with warnings.catch_warnings():
                # No micro-batch leaves the pipeline while it fills, so that the first batches may have no loss.
                warnings.filterwarnings("ignore", message=".*training_step.* returned `None`")
                self._is_stepping = True
                try:
                    return closure()
                finally:
                    self._is_stepping = False
                    # Also where the pipeline still fills, and no stage has updated yet.
                    count_as_stepped(optimizer)
        with hooks_before_step_inside(self.precision_plugin, self._before_step):
            result = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self.pipeline is not None:
            self.pipeline.updated()
        return result

    @contextmanager
    def _before_step(self) -> Iterator[None]:
        """Around the hooks and the clipping before a step of the optimizer for all stages."""
        with self._placement.gradients_known():
            yield
        if self._training is not None:
            self._training.check_gradients()

    def split_batch(self, batch: Any) -> list[Any]:
        """The micro-batches of a mini-batch."""
        assert self._training is not None
        return self._training.batches.split(batch)

    def batch_size(self, batch: Any) -> int:
        """The samples of a mini-batch."""
        assert self._training is not None
        return self._training.batches.size(batch)

    def gradients(self, microbatch: Any, batch_idx: int, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The gradients of some parameters for a micro-batch, if all stages had their present weights, as a vector."""
        assert self._training is not None
        return self._training.current_gradients(microbatch, batch_idx, parameters)

    @override
    def drain(self) -> None:
        """Finish the micro-batches in flight, with their updates."""
        if self._training is not None:
            self._training.drain()
            self._training.watch_saturation()

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
        """Run the step on a whole batch."""
        with context():
            return self._placement.evaluate(partial(function, *args), args[0])

    # ------------------------------------------------------------ checkpoints

    @ProcessStrategy.checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        """A user's own; one that saves in the background gets ours to save with."""
        if isinstance(io, AsyncCheckpointIO):
            io.checkpoint_io = SealedCheckpointIO()
        self._checkpoint_io = io

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self.drain()
        state = self._placement.module_state(super().lightning_module_state_dict())
        checkpoints = _analog_checkpoints()
        return state if checkpoints is None else checkpoints.leave_out_contexts(state)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = self._placement.optimizer_state(optimizer)
        return super().optimizer_state(optimizer) if state is None else state

    @override
    def on_train_end(self) -> None:
        """Every process ends with the whole trained module, as after any other strategy."""
        self._placement.end()

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
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self._training is not None and self._training.is_cut_off:
            rank_zero_warn(
                "the run has ended within a mini-batch, from which some stages have learnt and others have not: this "
                f"state is not saved as {filepath}, and the checkpoints of before stay as they are"
            )
            return
        check_finite(self._module, checkpoint["state_dict"], checkpoint["global_step"])
        # First in the file, so that a reader without aimc_pl is told of this package.
        super().save_checkpoint({_CHECKPOINT_KEY: self._state()} | checkpoint, filepath, storage_options)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds besides Lightning's."""
        state: dict[str, Any] = {}
        if analog_layers(self._module) and (checkpoints := _analog_checkpoints()):
            state["analog"] = checkpoints.AnalogCheckpoint()
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
        with self._admitted_classes():
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self._resumed = dict(checkpoint.get(_CHECKPOINT_KEY, {}))
        if len(self._resumed.get("split_at") or ()) != self.schedule.num_stages - 1:
            self._resumed.pop("split_at", None)
        return checkpoint

    def _admitted_classes(self) -> AbstractContextManager[Any]:
        """While it is open, a file may name what the program itself has configured as well."""
        checkpoints = _analog_checkpoints()
        return nullcontext() if checkpoints is None else safe_globals([*checkpoints.classes_of_tiles(self._module)])

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if checkpoints := _analog_checkpoints():
            checkpoints.check_devices(self._module, checkpoint["state_dict"])
        super().load_model_state_dict(checkpoint, strict)

    # -------------------------------------------------------------------- end

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._placement = OneProcess()
        if self._training is not None:
            self._training.abandon()
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        self._placement.end()
        # What follows has the same stages, and nothing else of a checkpoint.
        split_at = self._resumed.get("split_at")
        if self._training is not None:
            self._training.abandon()
            split_at = self._training.split_at
        self._resumed = {"split_at": split_at}
        super().teardown()


def _analog_checkpoints() -> Any:
    """What knows how analog layers are kept in checkpoints; ``None`` where aihwkit is not installed."""
    if find_spec("aihwkit") is None:
        return None
    from aimc_pl.devices import checkpoint

    return checkpoint
