"""This module holds all uses of private names of aihwkit. A test fails if aihwkit drops one of these names."""

from collections.abc import Iterable
from typing import Any

import torch
from aihwkit.nn import conversion
from torch import nn


def convert_to_digital_too(layers: Iterable[type[nn.Module]]) -> None:
    """Register classes of analog layers with aihwkit's ``convert_to_digital``, which compares exact types."""
    conversion._DEFAULT_DIGITAL_CONVERSION_SET.update(layers)


class RecreatedQuietly:
    """Mixin for a tile that keeps torch's random state when aihwkit creates the tile's crossbar again.

    aihwkit does this for a copy, and when a state is loaded.
    """

    def _recreate_simulator_tile(self, x_size: int, d_size: int, rpu_config: Any) -> Any:
        parent: Any = super()
        with torch.random.fork_rng(devices=[]):
            return parent._recreate_simulator_tile(x_size, d_size, rpu_config)
