"""This package simulates analog tiles on any torch device: updates are computed from numbers of pulses (mean field)."""

from aimc_pl.devices.mean_field.support import to_mean_field
from aimc_pl.devices.mean_field.tile import MeanFieldRPUConfig, MeanFieldTile, MeanFieldTileArray
from aimc_pl.devices.mean_field.vectors import Convolution

__all__ = ["Convolution", "MeanFieldRPUConfig", "MeanFieldTile", "MeanFieldTileArray", "to_mean_field"]
