"""This module measures how many weights of an analog layer are at a bound of their devices."""

from typing import Any

import torch

from aimc_pl.devices.mean_field import MeanFieldTile

_MARGIN = 0.05
"""The distance from a bound, relative to the range, within which a weight counts. Soft bounds are never reached."""


def saturated_fraction(layer: Any) -> float:
    """Return the fraction of an analog layer's weights that are at a bound of their device, or close to one.

    Args:
        layer: an analog layer. Only its mean-field tiles count; without any, the fraction is 0.
    """
    near, total = 0, 0
    for tile in layer.analog_tiles():
        if isinstance(tile, MeanFieldTile):
            for crossbar in tile.tile.crossbars:
                weight = crossbar.weight
                lower, upper = (torch.as_tensor(bound, device=weight.device) for bound in crossbar.response.bounds)
                margin = _MARGIN * (upper - lower)
                near += int(((weight <= lower + margin) | (weight >= upper - margin)).sum())
                total += weight.numel()
    return near / max(total, 1)
