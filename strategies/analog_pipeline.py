"""The Lightning Strategy: hooks in, core called, nothing computed here."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from inspect import Parameter, signature
from typing import Any, Literal, override

import lightning.pytorch as pl
import torch
from aihwkit.optim.context import AnalogContext
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from aimc_pl.devices import DeviceSpec, analog_layers, convert_to_analog, make_analog_aware, reset_pending_updates
from aimc_pl.devices.checkpoint import trust_aihwkit
from aimc_pl.distributed import Link, rank_of
from aimc_pl.errors import UsageError
from aimc_pl.microbatch import batch_size, split_batch
from aimc_pl.partition import partition
from aimc_pl.pipeline import Observer, Pipeline
from aimc_pl.schedule import Duplex, Schedule, ScheduleName
from aimc_pl.stage import SavedParameters, Stage
from aimc_pl.strategies.checks import check_analog_support, check_module, warn_about_microbatches
from aimc_pl.strategies.logbook import Logbook
from aimc_pl.strategies.microbatch import BackboneCall, TrainingStep, merge_outputs
from aimc_pl.strategies.ownership import Ownership
from aimc_pl.strategies.planning import (
    backbone_candidates,
    get_backbone,
    measured_split,
    other_parameters,
    parameters_behind,
)
from aimc_pl.strategies.processes import ProcessStrategy, RandomStream
from aimc_pl.strategies.suspension import SuspendableCall

_CHECKPOINT_KEY = "aimc_pl"


class AnalogPipelineStrategy(ProcessStrategy):
    """Trains an unmodified LightningModule on a pipeline of analog in-memory computing accelerators.

    The module's backbone is split into stages; every mini-batch is split into micro-batches, which pass through the
    stages as the schedule says. ``training_step`` runs once per micro-batch. Validation, test and predict run whole
    batches. With ``Trainer(devices=1)`` one process simulates all stages, clock by clock; with ``devices=num_stages``
    (over all nodes) every stage runs in a process of its own, where rank 0 holds the last stage.

    Args:
        num_stages: M, the number of accelerators the network is spread over.
        schedule: ``"none"`` (no pipeline), ``"sync"`` (fill-drain), ``"1f1b"`` (the same updates and clock cycles,
            fewer activations in flight) or ``"async"`` (every stage updates after each micro-batch, with stale
            weights and without weight stashing).
        num_microbatches: B, the micro-batches of one mini-batch.
        device: what the Linear and Conv layers of the backbone (of the whole module, if no backbone is named) become:
            the name of an analog device (``aimc-pl devices`` lists them) or an aihwkit RPUConfig. A mapping chooses
            per layer: its keys are patterns of layer names within the backbone, or stage numbers (with ``split_at``),
            the last match wins, ``None`` stays digital. ``None``: the network as it is.
        backbone: name of the submodule to pipeline, ``""`` for the module's own ``forward``. ``None`` takes the first
            call in training_step that holds at least half of the parameters.
        split_at: names, within the backbone, of the modules with which stages 1 … M−1 begin. ``None`` balances the
            stages by the measured time of forward, backward and update, and says which names it took.
        duplex: of ``"async"``: ``"half"``, one operation per stage and clock, or ``"full"``, a forward and a backward.
        gradient_scale: ``"minibatch"`` weights a micro-batch's loss by its share of the mini-batch's samples, under
            every schedule; ``"microbatch"`` (``"async"`` only) makes every micro-batch's update a full step.
        weight_stashing: of ``"async"`` and digital networks: backward with the weights of the forward (PipeDream).
        loss_reduction: how the loss in training_step reduces over samples, ``"mean"`` or ``"sum"``.
        timeout: seconds after which a process that does not answer is taken for lost, which ends the run.

    Raises:
        UsageError: if arguments exclude each other.
    """

    strategy_name = "aimc_pipeline"

    def __init__(
        self,
        num_stages: int = 4,
        schedule: ScheduleName = "async",
        num_microbatches: int = 4,
        device: DeviceSpec = None,
        backbone: str | None = None,
        split_at: Sequence[str] | None = None,
        duplex: Duplex = "half",
        gradient_scale: Literal["minibatch", "microbatch"] = "minibatch",
        weight_stashing: bool = False,
        loss_reduction: Literal["mean", "sum"] = "mean",
        timeout: float = 60.0,
    ) -> None:
        super().__init__(num_stages, timeout)
        self.schedule = Schedule(schedule, num_stages, num_microbatches, duplex)
        self.device = device
        self.backbone = backbone
        self.split_at = split_at
        self.gradient_scale = gradient_scale
        self.weight_stashing = weight_stashing
        self.loss_reduction = loss_reduction
        self.observers: list[Observer] = []
        """Told of every operation of the pipeline; callbacks append themselves."""
        self.pipeline: Pipeline | None = None
        """The running pipeline, from the first mini-batch of a fit on."""
        self._check_arguments()
        self._resumed_split: list[str] | None = None
        self._logbook = Logbook()
        self._steps: list[TrainingStep] = []
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self._ownership: Ownership | None = None
        self._freed: list[tuple[nn.Parameter, torch.Size]] = []

    def _check_arguments(self) -> None:
        choices = {"gradient_scale": ("minibatch", "microbatch"), "loss_reduction": ("mean", "sum")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"unknown {name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if not self.schedule.is_async and self.gradient_scale == "microbatch":
            raise UsageError(
                f"gradient_scale='microbatch' needs schedule='async': {self.schedule.name!r} updates per mini-batch"
            )
        if not self.schedule.is_async and self.weight_stashing:
            raise UsageError(f"weight_stashing needs schedule='async': {self.schedule.name!r} has no stale weights")
        if isinstance(self.split_at, str):
            raise UsageError(f"split_at is a list of module names, got the string {self.split_at!r}")
        if self.split_at is not None and len(self.split_at) != self.schedule.num_stages - 1:
            raise UsageError(
                f"num_stages={self.schedule.num_stages} needs {self.schedule.num_stages - 1} names in split_at, "
                f"got {len(self.split_at)}"
            )

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        for schedule in ("none", "sync", "async"):
            strategy_registry.register(
                f"aimc_{schedule}", cls, description=f"analog pipeline, schedule {schedule}", schedule=schedule
            )

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
        if self.is_multiprocess:
            self.share_start(self._module)
            self._common, self._own = RandomStream("common"), RandomStream(f"rank {self.global_rank}")
        self._convert()
        super().setup(trainer)
        self._prepare(trainer)
        if fitting:
            self._prepare_fit(trainer)

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
        step = signature(type(self.optimizers[0]).step).parameters
        if self.schedule.is_async and "closure" in step and step["closure"].default is Parameter.empty:
            raise UsageError(
                f"{type(self.optimizers[0]).__name__} evaluates the loss itself, which stages under schedule='async' "
                "cannot: use another optimizer, or schedule='sync'"
            )
        make_analog_aware(self.optimizers[0])

    def _convert(self) -> None:
        """Make the layers analog: before a state dict is loaded, and before the optimizer is built."""
        if self.device is not None:
            convert_to_analog(get_backbone(self._module, self.backbone), self.device, self.split_at)
        if self.weight_stashing and analog_layers(self._module):
            raise UsageError("weight_stashing is for digital networks: a crossbar cannot keep a second set of weights")
        check_analog_support(self._module, self.root_device, self.precision_plugin)

    def _prepare(self, trainer: "pl.Trainer") -> None:
        """The pipeline itself is built when the first micro-batch comes to the backbone."""
        self.pipeline = None
        self._ownership = None
        self._inferring: nn.Module | None = None
        self._freed = []
        self._candidates = backbone_candidates(self._module, self.backbone)
        if not any(isinstance(callback, _InTime) for callback in trainer.callbacks):  # pyright: ignore[reportAttributeAccessIssue]
            trainer.callbacks.insert(0, _InTime())  # pyright: ignore[reportAttributeAccessIssue]

    def _prepare_fit(self, trainer: "pl.Trainer") -> None:
        reset_pending_updates(self._module)
        warn_about_microbatches(self._module, self.schedule, self.loss_reduction)
        self._is_new = True
        self._loss_is_checked = not (self.schedule.is_async or self.is_multiprocess)
        # Parameters on the way to the backbone are stage 0's, and as delayed.
        saved = SavedParameters(self._module.parameters(), self._first_version if self.weight_stashing else None)
        self._saved = saved.hooks if self.schedule.is_async else nullcontext

    def _first_version(self) -> int:
        return self.pipeline.stages[0].version if self.pipeline else 0

    def _build_pipeline(self, call: BackboneCall) -> Pipeline:
        """Split the backbone into stages, at its first call."""
        module, schedule = self._module, self.schedule
        split_at = self.split_at if self.split_at is not None else self._resumed_split
        if split_at is None and self.is_global_zero:
            split_at = measured_split(module, call.name, schedule.num_stages, call.args, call.kwargs)
        parts = partition(call.backbone, schedule.num_stages, call.args, call.kwargs, self.broadcast(split_at))
        before, after = other_parameters(module, parts.stages, tree_leaves(call.inputs))
        others = [before, *[[] for _ in parts.stages[1:]]]
        others[-1] = others[-1] + after
        self._ownership = Ownership(module, parts.stages, others)
        self._candidates = {call.name: call.backbone}
        self._split_at = parts.split_at
        rank_zero_info(
            f"Pipeline of {schedule.num_stages} stages, schedule {schedule.name!r}: "
            f"backbone={call.name!r}, split_at={parts.split_at}"
        )
        stages = [
            Stage(
                index,
                part,
                other_parameters=others[index],
                delayed=schedule.is_async,
                weight_stashing=self.weight_stashing,
                context=self.precision_plugin.train_step_context,
            )
            for index, part in enumerate(parts.stages)
            if index in self._stages_here
        ]
        link = None
        if self.is_multiprocess:
            nodes = self.gather(self.node_rank)
            (index,) = self._stages_here
            link = Link(
                index,
                schedule.num_stages,
                self.root_device,
                lambda rank: nodes[rank] == self.node_rank,
                self.timeout,
            )
            self._free(parts.stages)
        return Pipeline(stages, schedule, self._update_stage, self.observers, link)

    @property
    def _stages_here(self) -> list[int]:
        """The stages of this process."""
        num_stages = self.schedule.num_stages
        return [rank_of(self.global_rank, num_stages)] if self.is_multiprocess else [*range(num_stages)]

    @property
    def _has_first(self) -> bool:
        return 0 in self._stages_here

    @property
    def _has_last(self) -> bool:
        return self.schedule.num_stages - 1 in self._stages_here

    def _free(self, parts: Sequence[nn.Module]) -> None:
        """Keep nothing of the other stages on the device, and while fitting none of their digital weights at all."""
        mine = {id(parameter) for parameter in self._parameters_here()}
        fitting = self._module.trainer.state.fn == TrainerFn.FITTING
        for index, part in enumerate(parts):
            if index not in self._stages_here:
                part.to("cpu")
                for parameter in part.parameters():
                    if fitting and not isinstance(parameter, AnalogContext):
                        self._freed.append((parameter, parameter.shape))
                        parameter.data = parameter.data.new_empty(0)
        for optimizer in self.optimizers:
            for parameter in [parameter for parameter in optimizer.state if id(parameter) not in mine]:
                del optimizer.state[parameter]

    def _parameters_here(self) -> list[nn.Parameter]:
        assert self._ownership is not None
        return [parameter for index in self._stages_here for parameter in self._ownership.parameters(index)]

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._freed = []
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        if self._freed:
            self.on_train_end()  # which a fit without steps does not come to
        self._abandon()
        super().teardown()

    # --------------------------------------------------------------- training

    @override
    def training_step(self, batch: Any, *args: Any) -> Any:
        steps = self._make_steps(batch, args)
        if self._has_first or self._has_last:
            self._steps += steps
        # Lightning clears the gradients after training_step, which here includes the backward: set ours aside until
        # it asks for them in `backward`.
        parameters = [p for p in self._module.parameters() if not isinstance(p, AnalogContext)]
        accumulated = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        with self._running(), self._own_random():
            if self.pipeline is None:
                self.pipeline = self._build_pipeline(steps[0].call)
                if not (self._has_first or self._has_last):
                    steps[0].abort()
            if self._is_new:
                self._is_new = False
                if len(steps) < self.schedule.num_microbatches:
                    raise UsageError(
                        f"a mini-batch of {batch_size(batch)} samples cannot be split into num_microbatches="
                        f"{self.schedule.num_microbatches} micro-batches: lower it, or raise the batch size"
                    )
                for observer in self.observers:
                    observer.on_start(self.pipeline.stages)
            self.pipeline.run(steps)
            if self._must_drain():
                self.pipeline.drain()
        self._gradients = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        for parameter, gradient in zip(parameters, accumulated, strict=True):
            parameter.grad = gradient
        finished = self._take_finished()
        if not self._has_last:
            self._logbook = Logbook()
            # The loss is not known here, and Lightning updates for a loss only.
            return None if self.schedule.is_async else torch.full((), torch.nan, device=self.root_device)
        with self.precision_plugin.train_step_context():
            self._logbook.write(self._module.log)
        return merge_outputs(finished, self.loss_reduction)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        loss = self.precision_plugin.pre_backward(closure_loss, self._module)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._gradients = []
        return self.precision_plugin.post_backward(loss, self._module)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        if self.schedule.is_async:
            with warnings.catch_warnings():
                # No micro-batch leaves the pipeline while it fills, so that the first batches may have no loss.
                warnings.filterwarnings("ignore", message=".*training_step.* returned `None`")
                return closure()
        with ExitStack() as patches:
            if self.is_multiprocess:
                patches.enter_context(_replaced(self.precision_plugin, "clip_grad_by_norm", self._clip_by_total_norm))
            result = super().optimizer_step(optimizer, closure, model, **kwargs)
        assert self.pipeline is not None
        self.pipeline.updated()
        return result

    def _clip_by_total_norm(self, optimizer: Optimizer, max_norm: float) -> None:
        if max_norm > 0:
            self.clip_by_total_norm([*self.precision_plugin.main_params(optimizer)], max_norm)

    def drain(self) -> None:
        """Finish the micro-batches in flight, with their updates."""
        if self.pipeline is None or self.pipeline.is_empty:
            return
        with self._running(), self._own_random():
            self.pipeline.drain()
        self._take_finished()
        if not self._has_last:
            self._logbook = Logbook()
        elif self._module.trainer.training:
            hook, self._module._current_fx_name = self._module._current_fx_name, "training_step"
            with self.precision_plugin.train_step_context():
                self._logbook.write(self._module.log)
            self._module._current_fx_name = hook

    def _take_finished(self) -> list[TrainingStep]:
        finished = [step for step in self._steps if step.is_finished]
        self._steps = [step for step in self._steps if not step.is_finished]
        return finished

    def _make_steps(self, batch: Any, args: tuple[Any, ...]) -> list[TrainingStep]:
        total = batch_size(batch)
        steps = []
        for microbatch in split_batch(batch, self.schedule.num_microbatches):
            size = batch_size(microbatch)
            weight = size / total if self.loss_reduction == "mean" else 1.0
            if self.gradient_scale == "microbatch":
                weight *= total / size
            weight /= self._module.trainer.accumulate_grad_batches
            function = partial(self._module.training_step, microbatch, *args)
            steps.append(
                TrainingStep(function, size, weight, self._check_loss, self._step_context, self._common_random)
            )
        return steps

    def _common_random(self) -> AbstractContextManager[None]:
        """What the first and the last stage's process draw alike, on the way to the backbone."""
        return self._common.drawn() if self.is_multiprocess else nullcontext()

    def _own_random(self) -> AbstractContextManager[None]:
        """What the processes draw for themselves, so that their samplers still draw alike."""
        return self._own.drawn() if self.is_multiprocess else nullcontext()

    @contextmanager
    def _step_context(self) -> Iterator[None]:
        with torch.enable_grad(), self._saved(), self.precision_plugin.train_step_context():
            yield

    def _check_loss(self, loss: Tensor) -> None:
        """Once, on the first loss: a stage's parameters in it would be updated by a loss of other micro-batches."""
        if self._loss_is_checked:
            return
        self._loss_is_checked = True
        assert self._ownership is not None
        behind = parameters_behind([loss])
        for stage in range(self.schedule.num_stages - 1):
            if any(id(parameter) in behind for parameter in self._ownership.parameters(stage)):
                where = (
                    "another process updates" if self.is_multiprocess else "schedule='async' updates at another time"
                )
                remedy = "devices=1" if self.is_multiprocess else "schedule='sync'"
                raise UsageError(
                    f"the loss reads parameters of stage {stage} directly (a penalty on the weights, say), which "
                    f"{where}: use the optimizer's weight_decay, or {remedy}"
                )

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Inside training_step, the backbone's call enters the pipeline and logged values enter the logbook."""
        module = self._module
        with ExitStack() as patches:
            for name, candidate in self._candidates.items():
                patches.enter_context(_replaced(candidate, "forward", self._enter_pipeline(name, candidate)))
            patches.enter_context(_replaced(module, "log", self._record(module.log)))
            try:
                yield
            except BaseException:
                self._abandon()
                raise

    def _enter_pipeline(self, name: str, backbone: nn.Module) -> Callable[..., Any]:
        forward = backbone.forward

        def enter(*args: Any, **kwargs: Any) -> Any:
            step = SuspendableCall.current()
            return (
                forward(*args, **kwargs) if step is None else step.suspend(BackboneCall(name, backbone, args, kwargs))
            )

        return enter

    def _record(self, log: Callable[..., None]) -> Callable[..., None]:
        def record(*args: Any, **kwargs: Any) -> None:
            step = SuspendableCall.current()
            if isinstance(step, TrainingStep):
                self._logbook.record(step.size, **signature(log).bind(*args, **kwargs).arguments)
            else:
                log(*args, **kwargs)

        return record

    def _update_stage(self, stage: Stage) -> None:
        """Lightning's order for one stage: the hooks and the clipping, the step, zero_grad."""
        optimizer = self.optimizers[0]
        mine = {id(parameter) for parameter in stage.parameters}
        groups = [(group, group["params"]) for group in optimizer.param_groups]
        try:
            for group, parameters in groups:
                group["params"] = [parameter for parameter in parameters if id(parameter) in mine]
            self.precision_plugin._after_closure(self._module, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        finally:
            for group, parameters in groups:
                group["params"] = parameters

    def _must_drain(self) -> bool:
        """Whether validation, the end of the epoch or the end of the fit follows this mini-batch."""
        trainer = self._module.trainer
        epoch, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        assert fetcher is not None
        return (
            epoch.batch_progress.is_last_batch
            or trainer.global_step + 1 == trainer.max_steps
            or epoch._should_check_val_fx(fetcher)
        )

    def _abandon(self) -> None:
        """After an error: nothing in flight goes on, and nothing half done is applied later."""
        for step in self._steps:
            step.abort()
        self._steps = []
        self._logbook = Logbook()
        if self.pipeline is not None:
            self.pipeline.abandon()
            reset_pending_updates(self._module)

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
        """Run the step on a whole batch: at once, or with its backbone's call passed through the processes."""
        if not self.is_multiprocess:
            with context():
                return function(*args)
        step = SuspendableCall(partial(function, *args))
        with self._running(), self._own_random(), context():
            result: Any = None
            if self._has_first or self._has_last or self._inferring is None:
                with self._common_random():
                    result = step.start()
            if self._inferring is None and step.is_suspended:
                self._prepare_inference(result)
            if self.pipeline is None:
                return result
            outputs = self.pipeline.infer(
                [self._inferring or nn.Identity()], lambda: result.inputs if step.is_suspended else None
            )
            if not self._has_last:
                step.abort()
                return None
            if step.is_suspended:
                result = step.resume(outputs)
            if step.is_suspended:
                step.abort()
                raise UsageError(
                    f"{function.__name__} calls the backbone twice, and with one stage per process a batch passes "
                    "through the pipeline once: call it once on the concatenated inputs, or use Trainer(devices=1)"
                )
            return result

    def _prepare_inference(self, call: BackboneCall) -> None:
        """Trace the backbone once more: in evaluation it may go other ways."""
        with torch.inference_mode(False):
            args, kwargs = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (call.args, call.kwargs))
            call = call._replace(args=args, kwargs=kwargs)
            if self.pipeline is None:
                self.pipeline = self._build_pipeline(call)
            parts = partition(call.backbone, self.schedule.num_stages, args, kwargs, self._split_at)
            (self._inferring,) = (parts.stages[index] for index in self._stages_here)

    # ------------------------------------------------------------ checkpoints

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self.drain()
        state = super().lightning_module_state_dict()
        if not self.is_multiprocess or self._ownership is None:
            return state
        return self._ownership.merge_state(state, self._stages_here[0], self.gather)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if not self.is_multiprocess or self._ownership is None:
            return super().optimizer_state(optimizer)
        return self._ownership.merge_optimizer(optimizer, self._stages_here[0], self.gather)

    @override
    def on_train_end(self) -> None:
        """Every process ends with the whole trained module, as after any other strategy."""
        if self.is_multiprocess and self._ownership is not None:
            state = self.lightning_module_state_dict()
            for parameter, shape in self._freed:
                parameter.data = parameter.data.new_empty(shape)
            self._freed = []
            self._module.load_state_dict(state)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.pipeline is not None:
            checkpoint[_CHECKPOINT_KEY] = {"split_at": self._split_at}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        with trust_aihwkit(checkpoint_path):
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        split_at = checkpoint.get(_CHECKPOINT_KEY, {}).get("split_at", [])
        if len(split_at) == self.schedule.num_stages - 1:
            self._resumed_split = split_at
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self._convert()
        super().load_model_state_dict(checkpoint, strict)


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Another attribute on the instance, for a while."""
    own = vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        delattr(module, name)
        if own is not None:
            setattr(module, name, own)


class _InTime(Callback):
    """Before anyone looks at weights or metrics: drains, where training_step could not foresee it, and shares."""

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if any(c.monitor and c._every_n_train_steps and step % c._every_n_train_steps == 0 for c in _savers(trainer)):
            _strategy_of(trainer).share_metrics(trainer)

    @override
    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        _strategy_of(trainer).drain()

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        _strategy_of(trainer).share_metrics(trainer)

    @override
    def on_test_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        _strategy_of(trainer).share_metrics(trainer)

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        _strategy_of(trainer).drain()
        _strategy_of(trainer).share_metrics(trainer)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        _strategy_of(trainer).drain()


def _strategy_of(trainer: "pl.Trainer") -> AnalogPipelineStrategy:
    assert isinstance(trainer.strategy, AnalogPipelineStrategy)
    return trainer.strategy


def _savers(trainer: "pl.Trainer") -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
