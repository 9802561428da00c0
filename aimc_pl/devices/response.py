"""How a device's weight answers to update pulses."""

import numpy as np
from aihwkit.simulator.parameters.base import RPUConfigBase
from aihwkit.utils.visualization import compute_pulse_response, get_tile_for_plotting
from matplotlib.figure import Figure

from aimc_pl.errors import UsageError


def plot_response(device: RPUConfigBase, title: str = "", num_pulses: int = 1000, num_devices: int = 8) -> Figure:
    """Draw the weights of a few cross-points under pulses up, then down, twice over.

    Args:
        device: an aihwkit configuration.
        title: of the picture.
        num_pulses: pulses in one direction.
        num_devices: cross-points.

    Raises:
        UsageError: if the device is not updated by pulses.
    """
    if not hasattr(device, "update"):
        raise UsageError(f"{title or type(device).__name__} is not updated by pulses: there is no response to draw")
    tile = get_tile_for_plotting(device, num_devices, w_init=0.0)  # pyright: ignore[reportArgumentType]
    directions = np.tile(np.repeat([1.0, -1.0], num_pulses), 2)
    weights = compute_pulse_response(tile, directions)[:, :, 0]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(weights, linewidth=0.6, alpha=0.6)
    axes.plot(weights.mean(1), color="black", linewidth=1.5, label=f"mean of {num_devices} devices")
    axes.set(xlabel="pulse", ylabel="weight", title=title)
    axes.legend(loc="upper right")
    return figure
