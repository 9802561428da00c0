"""This module measures what keeps analog layers from learning: weights at a bound, and too short pulse trains."""

from collections.abc import Iterable
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from aimc_pl.devices.mean_field import MeanFieldTile
from aimc_pl.devices.mean_field.crossbar import Tally
from aimc_pl.devices.mean_field.one_sided import OneSidedSimulatorTile
from aimc_pl.devices.mean_field.tile import MeanFieldSimulatorTile

_MARGIN = 0.05
"""The distance from a bound, relative to the range, within which a weight counts. Soft bounds are never reached."""

_ENOUGH = 20
"""The number of updates over which the mean of what is lost says something. The first gradients may be large."""


def positions(layer: Any) -> list[Tensor]:
    """Return where an analog layer's weights are in their devices' range: -1 at the lower bound, 1 at the upper one.

    Args:
        layer: an analog layer. Only its mean-field tiles count.

    Returns:
        a vector for each crossbar. It is 1 for a cross-point whose weight cannot change, and 0 for a one-sided device
        that is in the half of its range where it starts.
    """
    found = []
    tiles = _mean_field_tiles(layer)
    for crossbar, sign in ((crossbar, sign) for tile in tiles for crossbar, sign in _crossbars(tile)):
        weight = crossbar.weight
        lower, upper = (torch.as_tensor(bound, device=weight.device) for bound in crossbar.bounds)
        position = (2 * weight - lower - upper) / (upper - lower)
        if sign != 0:
            # The bound at which a one-sided device starts does not stop it.
            position = (sign * position).clamp(min=0) * sign
        found.append(torch.where(upper > lower, position, 1.0).flatten())
    return found


def saturated_fraction(layer: Any) -> float:
    """Return the fraction of an analog layer's weights that are at a bound of their device, or close to one.

    Args:
        layer: an analog layer. Only its mean-field tiles count; without any, the fraction is 0.
    """
    found = positions(layer)
    near = sum(int((position.abs() >= 1 - 2 * _MARGIN).sum()) for position in found)
    return near / max(sum(position.numel() for position in found), 1)


def cut_fractions(layer: Any) -> tuple[float, float]:
    """Return the fractions of updates and of transfers that pulse trains were too short for.

    They are means since the last call. Updates come from gradients, and transfers from another crossbar of the layer.

    Args:
        layer: an analog layer. Only its mean-field tiles count, and the crossbars that lost most; without any, and
            before 20 updates or transfers, the fraction is 0.
    """
    tiles = _mean_field_tiles(layer)
    return _largest_cut(tile.crossbars[:1] for tile in tiles), _largest_cut(tile.crossbars[1:] for tile in tiles)


def _largest_cut(crossbars: Iterable[Iterable[Any]]) -> float:
    fractions = [0.0]
    for crossbar in chain.from_iterable(crossbars):
        if crossbar.tally.num_updates >= _ENOUGH:
            fractions.append(float(crossbar.tally.cut) / crossbar.tally.num_updates)
            crossbar.tally = Tally()
    return max(fractions)


def _crossbars(tile: MeanFieldSimulatorTile) -> Iterable[tuple[Any, int]]:
    """Return the crossbars of a tile, each with the direction of its pulses, or 0 for both."""
    signs = tile.signs if isinstance(tile, OneSidedSimulatorTile) else repeat(0)
    return zip(tile.crossbars, signs, strict=False)


def _mean_field_tiles(layer: Any) -> list[MeanFieldSimulatorTile]:
    return [tile.tile for tile in layer.analog_tiles() if isinstance(tile, MeanFieldTile)]
