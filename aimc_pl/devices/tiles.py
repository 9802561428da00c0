"""What analog layers take and draw."""

import copy
import time

from aihwkit.nn.modules.base import AnalogLayerBase
from aihwkit.optim import AnalogSGD
from aihwkit.optim.context import AnalogContext
from torch import nn

from aimc_pl.devices.conversion import analog_layers
from aimc_pl.devices.mean_field import MeanFieldTile


def time_update(module: nn.Module) -> float:
    """Seconds that a module's tiles take to apply their pending errors, tried on a copy; 0 for other modules."""
    if not isinstance(module, AnalogLayerBase) or module.IS_CONTAINER:
        return 0.0
    for parameter in module.parameters():
        if isinstance(parameter, AnalogContext):
            # A copy of their graphs is neither possible nor needed.
            parameter.analog_input = [x.detach() for x in parameter.analog_input]
            parameter.analog_grad_output = [error.detach() for error in parameter.analog_grad_output]
    optimizer = AnalogSGD(copy.deepcopy(module).parameters(), lr=0.1)
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def are_seeded(module: nn.Module) -> bool:
    """Whether all random numbers of a module's tiles can be repeated; aihwkit's own tiles draw others every time."""
    tiles = [tile for layer in analog_layers(module) for tile in layer.analog_tiles()]
    return all(isinstance(tile, MeanFieldTile) for tile in tiles)
