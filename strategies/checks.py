"""What cannot work in a pipeline, said before training starts."""

import lightning.pytorch as pl
import torch
from aihwkit.simulator.rpu_base import cuda
from aihwkit.simulator.tiles.custom import CustomTile
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.loss import _Loss

from aimc_pl.devices import analog_layers
from aimc_pl.errors import UsageError
from aimc_pl.schedule import Schedule


def check_module(trainer: "pl.Trainer", schedule: Schedule) -> None:
    """Refuse what a LightningModule or a Trainer does that a pipeline cannot.

    Raises:
        UsageError: naming what it is and what to do instead.
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
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise UsageError("training_step(dataloader_iter) cannot be split into micro-batches: take a batch")
    accumulates = trainer.accumulate_grad_batches != 1 or any(
        isinstance(callback, GradientAccumulationScheduler)
        for callback in trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    )
    if schedule.is_async and accumulates:
        raise UsageError(
            "accumulate_grad_batches contradicts schedule='async', which updates after every micro-batch: "
            "use larger mini-batches, or schedule='sync'"
        )
    plugin = trainer.precision_plugin
    if isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
        raise UsageError("precision='16-mixed' needs one loss scale for all stages: use precision='bf16-mixed'")


def check_analog_support(module: nn.Module, device: torch.device, precision: Precision) -> None:
    """Refuse analog layers where their tiles cannot run.

    Raises:
        UsageError: for aihwkit's own tiles on a GPU without aihwkit's CUDA build, or in another precision than float32.
    """
    tiles = [tile for layer in analog_layers(module) for tile in layer.analog_tiles()]
    if device.type != "cpu" and not cuda.is_compiled():
        for tile in tiles:
            if not isinstance(tile, CustomTile):
                raise UsageError(
                    f"this build of aihwkit has no {type(tile).__name__} for {device}: choose a device with "
                    "backend='mean_field', or set Trainer(accelerator='cpu')"
                )
    if tiles and precision.precision not in ("32-true", "bf16-mixed"):
        raise UsageError(f"tiles compute in float32: precision={precision.precision!r} is for digital networks")


def warn_about_microbatches(module: nn.Module, schedule: Schedule, loss_reduction: str) -> None:
    """Warn of what splitting the mini-batch changes, where it can be seen."""
    if schedule.num_microbatches == 1:
        return
    if any(isinstance(m, _BatchNorm) and m.training and m.track_running_stats for m in module.modules()):
        rank_zero_warn(
            f"BatchNorm computes its statistics per micro-batch, a {schedule.num_microbatches}th of the mini-batch: "
            "results differ from a run on whole mini-batches"
        )
    for name, loss in module.named_modules():
        if isinstance(loss, _Loss) and loss.reduction != loss_reduction:
            rank_zero_warn(
                f"{name} reduces by {loss.reduction!r} and the strategy's loss_reduction is {loss_reduction!r}: "
                "if it is the training loss, its gradient is scaled wrongly; set loss_reduction"
            )
