"""This module measures what keeps analog layers from learning: weights at a bound, and too short pulse trains."""

from typing import Any

import torch

from aimc_pl.devices.mean_field import MeanFieldTile
from aimc_pl.devices.mean_field.tile import MeanFieldSimulatorTile

_MARGIN = 0.05
"""The distance from a bound, relative to the range, within which a weight counts. Soft bounds are never reached."""

_ENOUGH = 20
"""The number of updates over which the mean of what is lost says something. The first gradients may be large."""


def saturated_fraction(layer: Any) -> float:
    """Return the fraction of an analog layer's weights that are at a bound of their device, or close to one.

    Args:
        layer: an analog layer. Only its mean-field tiles count; without any, the fraction is 0.
    """
    near, total = 0, 0
    for crossbar in (crossbar for tile in _mean_field_tiles(layer) for crossbar in tile.crossbars):
        weight = crossbar.weight
        lower, upper = (torch.as_tensor(bound, device=weight.device) for bound in crossbar.bounds)
        margin = _MARGIN * (upper - lower)
        near += int(((weight <= lower + margin) | (weight >= upper - margin)).sum())
        total += weight.numel()
    return near / max(total, 1)


def cut_fraction(layer: Any) -> float:
    """Return the fraction of an update that pulse trains were too short for, as a mean since the last call.

    Args:
        layer: an analog layer. Only its mean-field tiles count, and the tile that lost most; without any, and before
            20 updates, the fraction is 0.
    """
    fractions = [0.0]
    for crossbar in (tile.crossbars[0] for tile in _mean_field_tiles(layer)):
        if crossbar.num_updates >= _ENOUGH:
            fractions.append(float(crossbar.cut) / crossbar.num_updates)
            crossbar.num_updates, crossbar.cut = 0, 0.0
    return max(fractions)


def _mean_field_tiles(layer: Any) -> list[MeanFieldSimulatorTile]:
    return [tile.tile for tile in layer.analog_tiles() if isinstance(tile, MeanFieldTile)]
