"""What we need of aihwkit that has no public name, each with a test that notices when it goes."""

from collections.abc import Iterable
from typing import Any

import torch
from aihwkit.nn import conversion
from torch import nn


def convert_to_digital_too(layers: Iterable[type[nn.Module]]) -> None:
    """Let aihwkit's ``convert_to_digital`` convert these classes of analog layers: it goes by exact types."""
    conversion._DEFAULT_DIGITAL_CONVERSION_SET.update(layers)


class RecreatedQuietly:
    """Mixin of a tile: to make its crossbar anew, as a copy and a loaded state do, draws no numbers of torch's."""

    def _recreate_simulator_tile(self, x_size: int, d_size: int, rpu_config: Any) -> Any:
        parent: Any = super()
        with torch.random.fork_rng(devices=[]):
            return parent._recreate_simulator_tile(x_size, d_size, rpu_config)
