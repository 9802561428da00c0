"""How much of a layer's crossbars is at the end of what its devices can reach."""

from typing import Any

import torch

from aimc_pl.devices.mean_field import MeanFieldTile

_MARGIN = 0.05
"""Of the distance between the bounds: soft bounds are never quite reached."""


def saturated_fraction(layer: Any) -> float:
    """The fraction of an analog layer's weights that are at a bound of their device, or nearly so.

    Args:
        layer: analog. Only mean-field tiles of devices with bounds are looked at; of others nothing counts.
    """
    near, total = 0, 0
    for tile in layer.analog_tiles():
        if isinstance(tile, MeanFieldTile):
            weight = tile.tile.get_weights(as_ref=True)
            lower, upper = (torch.as_tensor(bound, device=weight.device) for bound in tile.tile.response.bounds)
            margin = _MARGIN * (upper - lower)
            near += int(((weight <= lower + margin) | (weight >= upper - margin)).sum())
            total += weight.numel()
    return near / max(total, 1)
