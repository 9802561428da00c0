"""This module finds devices by name."""

from collections.abc import Callable
from copy import deepcopy
from difflib import get_close_matches
from types import FunctionType

from aihwkit.simulator.parameters.base import RPUConfigBase

from aimc_pl.arguments import shown
from aimc_pl.devices.algorithms import (
    agad,
    chopped_tiki_taka,
    chopped_transfer,
    dynamic_transfer,
    mixed_precision,
    residual_learning,
    symmetric_point_tracking,
    tiki_taka,
    tiki_taka_v2,
)
from aimc_pl.devices.catalogue import (
    AnalogDevice,
    constant_step,
    exp_step,
    ideal,
    linear_step,
    noisy_quantized,
    pow_step,
    soft_bounds,
    soft_bounds_reference,
)
from aimc_pl.devices.materials import (
    capacitor,
    ecram,
    ecram_mo,
    gokmen_vlasov,
    idealized,
    pcm,
    reram_es,
    reram_hfo2,
    reram_om,
    reram_sb,
)
from aimc_pl.devices.measured import piecewise_step
from aimc_pl.devices.scaling import weight_scaling
from aimc_pl.errors import UsageError

DEVICES: dict[str, Callable[..., AnalogDevice]] = {
    function.__name__: function
    for function in (
        ideal,
        soft_bounds,
        soft_bounds_reference,
        constant_step,
        linear_step,
        exp_step,
        pow_step,
        piecewise_step,
        noisy_quantized,
        ecram,
        ecram_mo,
        capacitor,
        reram_es,
        reram_sb,
        reram_om,
        reram_hfo2,
        pcm,
        gokmen_vlasov,
        idealized,
        residual_learning,
        chopped_transfer,
        dynamic_transfer,
        symmetric_point_tracking,
        tiki_taka,
        tiki_taka_v2,
        chopped_tiki_taka,
        agad,
        mixed_precision,
        weight_scaling,
    )
}
"""The devices by the names that ``device="name"`` accepts."""

Device = str | AnalogDevice | RPUConfigBase
"""A device's name, a device of the catalogue, or an aihwkit configuration."""


def get_device(device: Device) -> RPUConfigBase:
    """Return a copy of the aihwkit configuration of a device.

    Args:
        device: a device's name (all its parameters are then the defaults), an :class:`AnalogDevice`, or an aihwkit
            configuration.

    Raises:
        UsageError: if no device has that name, or if ``device`` has another type.
    """
    if isinstance(device, str) and device in DEVICES:
        device = DEVICES[device]()
    if isinstance(device, FunctionType):
        raise UsageError(f"call the function {shown(device.__name__)}: device={device.__name__}()")
    rpu_config = device.rpu_config if isinstance(device, AnalogDevice) else device
    if not isinstance(rpu_config, RPUConfigBase):
        alike = get_close_matches(device.rpartition(".")[2], DEVICES, n=1) if isinstance(device, str) else []
        meant = f"did you mean {alike[0]!r}? " if alike else ""
        raise UsageError(
            f"unknown device {shown(device)}: {meant}'aimc-pl devices' lists the names; an aihwkit RPUConfig will do "
            "too"
        )
    return deepcopy(rpu_config)
