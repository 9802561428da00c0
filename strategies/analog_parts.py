"""The functions in this module do what the strategy must do for analog layers.

They import aihwkit only where the user asks for analog layers, or where aihwkit is installed: digital training works
without it.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins import Precision
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from torch.serialization import safe_globals

from aimc_pl.analog import analog_layers, is_analog, learns_by_pulses, left_out
from aimc_pl.arguments import listed
from aimc_pl.errors import UsageError
from aimc_pl.strategies.checks import check_analog_support
from aimc_pl.strategies.settings import Settings

if TYPE_CHECKING:
    from aimc_pl.devices import DeviceSpec


def convert(
    module: nn.Module, device: "DeviceSpec", settings: Settings, root_device: torch.device, precision: Precision
) -> None:
    """Make the layers analog that ``device`` selects, and check that the run can train them.

    Raises:
        UsageError: if a layer cannot be analog, or if a setting does not go with analog layers.
    """
    if isinstance(device, Mapping) and "class_path" in device:
        raise UsageError(
            f"{device['class_path']} is no device: in a config, aimc_pl.devices.ConfiguredDevice takes a configuration "
            "of aihwkit as its rpu_config"
        )
    if device is not None:
        from aimc_pl.devices import convert_to_analog, describe_slow
        from aimc_pl.devices.conversion import check_devices_stay

        check_devices_stay(module, device, settings.split_at)
        if convert_to_analog(module, device, settings.split_at) and (line := describe_slow(device)):
            rank_zero_info(line)
    if settings.weight_stashing and analog_layers(module):
        raise UsageError("weight_stashing is for digital networks: a crossbar cannot keep a second set of weights")
    check_analog_support(module, root_device, precision)


def describe(module: nn.Module) -> str:
    """Return what a run says at its start of what is analog."""
    if not analog_layers(module):
        return "no layer is analog"
    from aimc_pl.devices import describe_layers

    return describe_layers(module)


def convert_optimizer(module: nn.Module, optimizer: Optimizer, lr_scale: float = 1.0) -> None:
    """Make the optimizer update analog layers by pulses, if there are any, and say what it does not do for them.

    Analog layers that are not in the optimizer are named in a warning.

    Raises:
        UsageError: if there is a scale of the learning rate, and no layer that learns by pulses.
    """
    if lr_scale != 1 and not any(map(learns_by_pulses, module.parameters())):
        raise UsageError(f"analog_lr_scale={lr_scale:g} is for layers that learn by pulses, and there are none")
    if any(map(is_analog, module.parameters())):
        from aimc_pl.devices import describe_updates, make_analog_aware

        make_analog_aware(optimizer, lr_scale)
        if line := describe_updates(module, optimizer):
            rank_zero_info(line)
        _warn_of_left_out(module, optimizer)


def _warn_of_left_out(module: nn.Module, optimizer: Optimizer) -> None:
    weights = set(map(id, left_out(module, [optimizer])))
    layers = {name: layer for name, layer in module.named_modules() if is_analog(layer)}
    names = [name for name, layer in layers.items() if not weights.isdisjoint(map(id, layer.parameters()))]
    if names:
        rank_zero_warn(
            f"analog layers that are not in the optimizer do not learn: {listed(names)}. Give it parameters(), or "
            "freeze these layers, or keep them digital"
        )


def tell_of_clipping(module: nn.Module) -> None:
    """Say that the clipping of gradients does not reach crossbars that learn by pulses, if there are any."""
    if any(map(learns_by_pulses, module.parameters())):
        rank_zero_info(
            "clipping applies to the gradients of digital parameters only: layers that learn by pulses keep none. For "
            "smaller updates of these, lower the learning rate"
        )


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Return a module's state dict without the values that are not part of a checkpoint."""
    checkpoints = _checkpoints()
    return state if checkpoints is None else checkpoints.leave_out_contexts(state)


def seal(module: nn.Module) -> dict[str, Any]:
    """Return the entry of a checkpoint that names aimc_pl to programs without it; empty without analog layers."""
    if not analog_layers(module) or not (checkpoints := _checkpoints()):
        return {}
    return {"analog": checkpoints.AnalogCheckpoint()}


def admitted_classes(module: nn.Module) -> AbstractContextManager[Any]:
    """Context manager in which a checkpoint may also contain the classes that the module's own tiles are made of."""
    checkpoints = _checkpoints()
    return nullcontext() if checkpoints is None else safe_globals([*checkpoints.classes_of_tiles(module)])


def convert_as_saved(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Make the layers of a module analog that are analog in a state dict, on the devices they have there.

    Raises:
        UsageError: if the module does not have such a layer.
    """
    if checkpoints := _checkpoints():
        checkpoints.convert_as_saved(module, state)


def check_devices(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Check that a checkpoint's analog layers have the devices of the module's.

    Raises:
        UsageError: if a device differs. The message names both devices.
    """
    if checkpoints := _checkpoints():
        checkpoints.check_devices(module, state)


def _checkpoints() -> Any:
    """Return the module that knows how checkpoints keep analog layers, or ``None`` if aihwkit is not installed."""
    if find_spec("aihwkit") is None:
        return None
    from aimc_pl.devices import checkpoint

    return checkpoint
