"""A mean-field simulation of analog tiles: updates from the numbers of pulses, on any device that torch runs on."""

from aimc_pl.devices.mean_field.tile import MeanFieldRPUConfig, MeanFieldTile, MeanFieldTileArray, to_mean_field
from aimc_pl.devices.mean_field.vectors import Convolution

__all__ = ["Convolution", "MeanFieldRPUConfig", "MeanFieldTile", "MeanFieldTileArray", "to_mean_field"]
