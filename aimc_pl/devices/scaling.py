"""This module holds the scaling of weights, with which small weights use the range of their devices."""

from math import inf
from typing import Any

from aimc_pl.arguments import check_flag, check_number
from aimc_pl.devices.catalogue import AnalogDevice, ConfiguredDevice, copied_config, described
from aimc_pl.errors import UsageError


@described
def weight_scaling(device: AnalogDevice | None = None, omega: float = 0.6, columnwise: bool = True) -> AnalogDevice:
    """Scale the weights of a layer to the range of its devices (Rasch, Gokmen and Haensch, arXiv 1906.02698).

    The converters and the noise of a crossbar do not shrink with its weights, so small weights drown in noise. With
    this scaling the largest initial weight of a layer is ω on the crossbar, and digital factors undo the scaling at the
    outputs of the crossbar. The factors stay as they are in training: a weight can grow to the bound of the devices.
    This is the setting ``weight_scaling_omega`` of aihwkit's mapping.

    Args:
        device: any device, also one with another training algorithm; ``soft_bounds`` by default.
        omega: ω, the largest initial weight on the crossbar; at most the bound of the devices.
        columnwise: whether each output has its own factor. Otherwise all outputs of a tile share one.

    Raises:
        UsageError: if ω is out of range, or if the device is not one of a crossbar.
    """
    check_number("omega", omega, above=0)
    check_flag("columnwise", columnwise)
    config = copied_config(device)
    if not hasattr(config, "mapping"):
        raise UsageError(f"weight_scaling needs the device of a crossbar, got {device!r}")
    bound = _bound(getattr(config, "device", None))
    if omega > bound:
        raise UsageError(f"omega={omega} is beyond the bound of the device, {bound}: choose a smaller omega")
    config.mapping.weight_scaling_omega = omega
    config.mapping.weight_scaling_columnwise = columnwise
    return ConfiguredDevice(config)


def _bound(device: Any) -> float:
    """Return the bound of the device, or of the last of several in a cross-point."""
    for name in ("device", "unit_cell_devices"):
        inner = getattr(device, name, None)
        if inner is not None:
            return _bound(inner[-1] if isinstance(inner, list) else inner)
    return getattr(device, "w_max", inf)
