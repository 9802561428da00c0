"""This module measures and draws how the weights of a device respond to update pulses."""

from typing import Any

import numpy as np
import torch
from aihwkit.simulator.configs import SingleRPUConfig
from aihwkit.simulator.configs.compounds import MixedPrecisionCompound
from aihwkit.utils.visualization import compute_pulse_response
from matplotlib.figure import Figure
from numpy.typing import NDArray

from aimc_pl.arguments import check_number
from aimc_pl.devices.mean_field import to_mean_field
from aimc_pl.devices.names import Device, get_device
from aimc_pl.errors import UsageError
from aimc_pl.figures import BLACK, styled


def pulse_response(device: Device, num_pulses: int = 1000, num_devices: int = 8) -> NDArray[np.float64]:
    """Return the weights of a few cross-points after each of many pulses: up, then down, twice over.

    Args:
        device: a pulsed device: its name, a device of the catalogue, or an aihwkit configuration.
        num_pulses: number of pulses in one direction, at most 10,000.
        num_devices: number of cross-points, at most 1,000.

    Returns:
        The weights ``(4·num_pulses, num_devices)``.

    Raises:
        UsageError: if a number is out of range.
    """
    check_number("num_pulses", num_pulses, at_least=1, at_most=10_000, whole=True)
    check_number("num_devices", num_devices, at_least=1, at_most=1000, whole=True)
    config: Any = get_device(device)
    if isinstance(config.device, MixedPrecisionCompound):
        cross_point: Any = config.device.device
        config = to_mean_field(SingleRPUConfig(device=cross_point))
    config.update.update_bl_management = config.update.update_management = False
    config.update.desired_bl = 1
    tile = config.tile_class(num_devices, 1, config, False)
    tile.set_weights(torch.zeros(num_devices, 1))
    # A train has one slot. At this learning rate all lines fire in that slot, whatever the device's step. A device that
    # is updated without pulses has a step instead.
    tile.set_learning_rate(getattr(config.device, "step", 1.0))
    directions = np.tile(np.repeat([1.0, -1.0], num_pulses), 2)
    return compute_pulse_response(tile, directions)[:, :, 0]


@styled
def plot_response(device: Device, title: str = "", num_pulses: int = 1000, num_devices: int = 8) -> Figure:
    """Draw the weights of a few cross-points after each of many pulses: up, then down, twice over.

    Args:
        device: a device's name, a device of the catalogue, or an aihwkit configuration.
        title: title of the figure.
        num_pulses: number of pulses in one direction, at most 10,000.
        num_devices: number of cross-points, at most 1,000.

    Raises:
        UsageError: if the device is not updated by pulses, or if a number is out of range.
    """
    if not hasattr(get_device(device), "update"):
        raise UsageError(f"{title or device} is not updated by pulses: there is no response to draw")
    weights = pulse_response(device, num_pulses, num_devices)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    # Devices that differ little are still seen, as a wide line below the thin one of the mean.
    axes.plot(weights, linewidth=3, alpha=0.5)
    axes.plot(weights.mean(1), color=BLACK, linewidth=1, label=f"mean of {num_devices} devices")
    axes.set(xlabel="pulse", ylabel="weight", title=title)
    axes.legend(loc="upper right", bbox_to_anchor=(1, 1.12))
    return figure
