"""The checks in this module run before training starts. They refuse, or warn about, what cannot work in a pipeline."""

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from aimc_pl.analog import analog_layers, is_analog
from aimc_pl.arguments import listed
from aimc_pl.cost.states import needs_closure
from aimc_pl.errors import UsageError
from aimc_pl.private_torch import Loss
from aimc_pl.schedule import Schedule
from aimc_pl.stage import Stage
from aimc_pl.strategies.private_lightning import callbacks_of
from aimc_pl.strategies.settings import Settings
from aimc_pl.strategies.training_step import TrainingStep

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_TIME_FIRST = (nn.RNNBase, nn.MultiheadAttention)


def check_module(trainer: "pl.Trainer", schedule: Schedule) -> None:
    """Check that a LightningModule and its Trainer do nothing that a pipeline cannot do.

    Raises:
        UsageError: if they do. The message says what it is and what to do instead.
    """
    module = trainer.lightning_module
    if not module.automatic_optimization:
        raise UsageError(
            "manual optimization (automatic_optimization=False) cannot be pipelined: the pipeline runs backward and "
            "step itself. Use automatic optimization"
        )
    if is_overridden("backward", module, pl.LightningModule):
        raise UsageError(
            f"{type(module).__name__}.backward is overridden: the pipeline runs it stage by stage. Remove it"
        )
    if not schedule.forwards_first:
        _refuse_hooks_before_backward(trainer, schedule)
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise UsageError("training_step(dataloader_iter) cannot be split into micro-batches: take a batch")
    accumulates = trainer.accumulate_grad_batches != 1 or any(
        isinstance(callback, GradientAccumulationScheduler) for callback in callbacks_of(trainer)
    )
    if schedule.is_async and accumulates:
        raise UsageError(
            "accumulate_grad_batches contradicts schedule='async', which updates after every micro-batch: "
            "use larger mini-batches, or schedule='sync'"
        )
    plugin = trainer.precision_plugin
    if isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
        raise UsageError("precision='16-mixed' needs one loss scale for all stages: use precision='bf16-mixed'")


def _refuse_hooks_before_backward(trainer: "pl.Trainer", schedule: Schedule) -> None:
    module, callbacks = trainer.lightning_module, callbacks_of(trainer)
    having = [callback for callback in callbacks if is_overridden("on_before_backward", callback, pl.Callback)]
    if is_overridden("on_before_backward", module, pl.LightningModule):
        having.append(module)
    if having:
        raise UsageError(
            f"{type(having[0]).__name__}.on_before_backward comes too late under schedule={schedule.name!r}, where the "
            "first micro-batches have gone backward before the loss is known: use schedule='sync'"
        )


def check_analog_support(module: nn.Module, device: torch.device, precision: Precision) -> None:
    """Check that the tiles of analog layers can run on a device and in a precision.

    Raises:
        UsageError: for aihwkit's own tiles on a GPU without aihwkit's CUDA build, and for a precision other than
            ``"32-true"`` and ``"bf16-mixed"``: tiles compute in float32.
    """
    tiles = [tile for layer in analog_layers(module) for tile in layer.analog_tiles()]
    if not tiles:
        return
    # The imports are here because a digital run needs no aihwkit.
    from aihwkit.simulator.rpu_base import cuda
    from aihwkit.simulator.tiles.custom import CustomTile

    if device.type != "cpu" and not cuda.is_compiled():
        for tile in tiles:
            if not isinstance(tile, CustomTile):
                raise UsageError(
                    f"this build of aihwkit has no {type(tile).__name__} for {device}: choose a device with "
                    "backend='mean_field', or set Trainer(accelerator='cpu')"
                )
    if precision.precision not in ("32-true", "bf16-mixed"):
        raise UsageError(f"tiles compute in float32: precision={precision.precision!r} is for digital networks")


def check_analog_callbacks(trainer: "pl.Trainer") -> None:
    """Check that no callback of Lightning reads or sets weights, if there are analog layers.

    Weight averaging and finetuning would end in an error of aihwkit in the middle of the training, and pruning would
    prune the layers that the analog ones have replaced.

    Raises:
        UsageError: with the name of the first callback that does.
    """
    if not analog_layers(trainer.lightning_module):
        return
    for callback in callbacks_of(trainer):
        if isinstance(callback, BaseFinetuning | ModelPruning | StochasticWeightAveraging | WeightAveraging):
            raise UsageError(
                f"{type(callback).__name__} reads or sets weights, which crossbars do not allow: leave out the "
                "callback, or set device=None"
            )


def check_callbacks_of_processes(trainer: "pl.Trainer") -> None:
    """Check that no callback of Lightning searches for a value, which needs the loss and one process.

    Raises:
        UsageError: with the name of the first callback that does.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, LearningRateFinder | BatchSizeFinder):
            raise UsageError(
                f"{type(callback).__name__} needs the loss, which only one of several processes knows: use it with "
                "devices=1"
            )


def check_parameters(module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Check that the optimizers train parameters of the module only. Other parameters would belong to no stage.

    Raises:
        UsageError: with the shape of the first parameter that is not the module's.
    """
    known = set(map(id, module.parameters()))
    for parameter in (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]):
        if id(parameter) not in known:
            raise UsageError(
                f"the optimizer updates a parameter of shape {tuple(parameter.shape)} that is none of "
                f"{type(module).__name__}.parameters(), so that no process knows its stage: keep modules as "
                "attributes or in a ModuleList, not in a plain list"
            )


def check_optimizer(optimizer: Optimizer, gradients: Mapping[nn.Parameter, Tensor], stage: Stage) -> None:
    """Check that an optimizer updates a stage without the gradients of other stages, which are in other processes.

    Two copies of the optimizer make two steps each, one of them with larger gradients of the other stages. Both copies
    must update the stage alike. Optimizers of analog layers are not checked: their steps would change the tiles.

    Args:
        optimizer: the optimizer of all stages.
        gradients: the gradients of all parameters.
        stage: the stage whose updates are compared.

    Raises:
        UsageError: if the updates differ, or if the optimizer evaluates the loss itself. The message names it.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(map(is_analog, parameters)):
        return
    of_stage = set(map(id, stage.parameters))
    own = [id(parameter) in of_stage for parameter in parameters]
    calls = count()
    results = []
    for scale in (1.0, 1e6):
        twin, copies = _copy_of(optimizer, parameters)
        for parameter, copied, is_own in zip(parameters, copies, own, strict=True):
            gradient = gradients.get(parameter)
            if gradient is not None:
                copied.grad = gradient.clone() if is_own else gradient * scale
        with isolate_rng():
            for _ in range(2):
                twin.step(lambda: float(next(calls)))
        results.append([copied for copied, is_own in zip(copies, own, strict=True) if is_own])
    if next(calls) > 4:
        raise _evaluates_the_loss(optimizer)
    if not all(map(torch.equal, *results)):
        raise UsageError(
            f"{type(optimizer).__name__} updates a stage by the gradients of other stages, which are in other "
            "processes: use another optimizer (gradient_clip_val of the Trainer clips over all stages), or devices=1"
        )


@contextmanager
def one_optimizer() -> Iterator[None]:
    """Context manager that replaces Lightning's error about several optimizers, which advises manual optimization.

    Raises:
        UsageError: if configure_optimizers returns several optimizers.
    """
    try:
        yield
    except RuntimeError as error:
        if "multiple optimizers" not in str(error):
            raise
        raise UsageError(
            "the pipeline trains with one optimizer, and configure_optimizers returns several: return one with several "
            "parameter groups"
        ) from error


def check_closure(module: nn.Module, optimizer: Optimizer, *, stages_update_apart: bool) -> None:
    """Check that the optimizer's step does not need a closure, unless it updates digital layers, all together.

    Raises:
        UsageError: if it does, as the step of LBFGS.
    """
    if not needs_closure(optimizer):
        return
    analog = {id(parameter) for layer in analog_layers(module) for parameter in layer.parameters()}
    if any(id(parameter) in analog for group in optimizer.param_groups for parameter in group["params"]):
        raise UsageError(
            f"{type(optimizer).__name__} evaluates the loss between changes of the weights, which crossbars do not "
            "allow: use another optimizer, or set device=None"
        )
    if stages_update_apart:
        raise _evaluates_the_loss(optimizer)


def _evaluates_the_loss(optimizer: Optimizer) -> UsageError:
    """Return the error to raise when an optimizer's step runs forward and backward as often as it likes."""
    return UsageError(
        f"{type(optimizer).__name__} evaluates the loss itself, which stages under schedule='async', or in processes "
        "of their own, cannot: use another optimizer, or schedule='sync' with devices=1"
    )


def _copy_of(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> tuple[Optimizer, list[nn.Parameter]]:
    """Return a copy of an optimizer without its hooks, and the copies of the parameters that this copy updates.

    ``copy.deepcopy`` of the optimizer would leave out the attributes that subclasses add.
    """
    memo: dict[int, Any] = {}
    copies = [copy.deepcopy(parameter, memo) for parameter in parameters]
    own = {name: value for name, value in vars(optimizer).items() if name != "step" and not name.endswith("_hooks")}
    twin = object.__new__(type(optimizer))
    twin.__setstate__(copy.deepcopy(own, memo))
    return twin, copies


def check_updates(module: nn.Module, optimizer: Optimizer) -> None:
    """Check that an optimizer updates parameters of the module. Nothing else updates the stages.

    Raises:
        UsageError: if the optimizer updates none of them.
    """
    parameters = set(map(id, module.parameters()))
    if not any(id(parameter) in parameters for group in optimizer.param_groups for parameter in group["params"]):
        raise UsageError(
            "the optimizer updates no parameter of the module: make it within configure_optimizers, when layers are "
            "analog already (on the command line: by --model.optimizer, not by --optimizer)"
        )


def check_initialized(module: nn.Module, split_at: Sequence[str]) -> None:
    """Check that no stage begins with a lazy module.

    Each of several overlapping micro-batches would initialize such a module.

    Raises:
        UsageError: with the name of the first lazy module.
    """
    for name in split_at:
        if any(is_lazy(value) for value in module.get_submodule(name).parameters(recurse=False)):
            raise UsageError(
                f"{name!r} is lazy, and no stage can begin there before it has its parameters: call the network once "
                "in configure_model, or name another module in split_at"
            )


def check_microbatches(
    module: nn.Module,
    losses: Sequence[Tensor] | None,
    steps: Sequence[TrainingStep],
    settings: Settings,
    splits_by_sample: bool,
) -> None:
    """Warn if splitting the mini-batch changes its loss.

    The loss of the mini-batch is compared with those of its micro-batches. If that is not possible, the module is
    searched for known causes.

    Args:
        module: the module that is trained.
        losses: the losses of the micro-batches, followed by that of the whole mini-batch; ``None`` if they cannot be
            compared.
        steps: the runs of training_step on the micro-batches.
        settings: the arguments of the strategy.
        splits_by_sample: whether batches are split along the samples, because there is no function of the user.

    Raises:
        UsageError: if the batch has probably been split along time.
    """
    if losses is None:
        _warn_of_what_is_seen(module, settings)
        return
    weights = [1.0 if settings.loss_reduction == "sum" else step.share for step in steps]
    split, whole = sum(w * loss.double() for w, loss in zip(weights, losses[:-1], strict=True)), losses[-1].double()
    if torch.allclose(torch.as_tensor(split), whole, rtol=1e-7 if losses[-1].dtype == torch.float64 else 1e-3):
        return
    change = f"splitting the mini-batch changes its loss from {whole.item():.6g} to {float(split):.6g}"
    for name, part in module.named_modules():
        if isinstance(part, _TIME_FIRST) and not part.batch_first and splits_by_sample:
            raise UsageError(
                f"{change}, and {name!r} takes time first (batch_first=False): if the samples are not along the first "
                "dimension of the batch, give the strategy split_batch=, a function (batch, num_microbatches) -> "
                "micro-batches; it may also be a method of the LightningModule"
            )
    rank_zero_warn(
        f"{change}, because training_step does not treat samples one by one: BatchNorm's statistics, a mean over "
        "unmasked tokens or by class weights, or a loss over pairs of samples can be the reason. For means over "
        "something else than samples use microbatch_weight, for sums loss_reduction='sum', or num_microbatches=1"
    )


def _warn_of_what_is_seen(module: nn.Module, settings: Settings) -> None:
    if any(isinstance(m, _BATCH_NORMS) and m.training and m.track_running_stats for m in module.modules()):
        rank_zero_warn(
            "BatchNorm computes its statistics per micro-batch (the mini-batch is split into "
            f"{settings.schedule.num_microbatches}): results differ from a run on whole mini-batches"
        )
    for name, loss in module.named_modules():
        if isinstance(loss, Loss) and loss.reduction != settings.loss_reduction:
            rank_zero_warn(
                f"{name} reduces by {loss.reduction!r} and the strategy's loss_reduction is "
                f"{settings.loss_reduction!r}: if it is the training loss, its gradient is scaled wrongly; set "
                "loss_reduction"
            )


OTHER_PACKAGE = (
    "pytorch_lightning is imported, and this strategy is for the package lightning: write "
    "'import lightning.pytorch as pl' in the place of 'import pytorch_lightning as pl'"
)


def warn_about_other_package() -> None:
    """Warn if the package ``pytorch_lightning`` is imported, whose modules and trainers are other classes."""
    if "pytorch_lightning" in sys.modules:
        rank_zero_warn(OTHER_PACKAGE)


def too_few_samples(samples: int, num_microbatches: int) -> UsageError:
    """Return the error to raise when a mini-batch has fewer samples than it should have micro-batches."""
    return UsageError(
        f"a mini-batch of {samples} samples cannot be split into num_microbatches={num_microbatches} micro-batches: "
        "lower num_microbatches, or raise the batch size"
    )


def check_split(module: nn.Module, split_at: Sequence[str] | None, num_stages: int) -> None:
    """Check that every name in ``split_at`` is the name of a submodule, and that there are submodules for all stages.

    Raises:
        UsageError: with the first name that is not, and with the name that was probably meant; or with the number of
            submodules.
    """
    known = [name for name, _ in module.named_modules() if name]
    if len(known) < num_stages - 1:
        raise UsageError(
            f"num_stages={num_stages} needs {num_stages - 1} submodules for stages to begin at, and "
            f"{type(module).__name__} has {len(known)}: lower num_stages"
        )
    for name in split_at or ():
        if name in known:
            continue
        meant = [other for other in known if other.endswith(f".{name}")]
        hint = f": names are relative to the LightningModule, so write {meant[0]!r}" if len(meant) == 1 else ""
        raise UsageError(
            f"split_at names {name!r}, which is no submodule of {type(module).__name__}{hint}"
            f"{'' if hint else '; it has ' + listed(known)}"
        )
