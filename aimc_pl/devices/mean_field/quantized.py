"""This module simulates the idealised update of convergence theory: noise is added, and the result is rounded."""

from dataclasses import dataclass
from typing import Any

import torch
from aihwkit.simulator.configs import UpdateParameters
from torch import Tensor, nn

from aimc_pl.devices.mean_field.crossbar import Tally
from aimc_pl.devices.mean_field.random_table import TableGenerator, gaussian
from aimc_pl.devices.mean_field.tile import MeanFieldSimulatorTile
from aimc_pl.devices.mean_field.vectors import Patches, Vectors


@dataclass
class NoisyQuantizedDevice:
    """Cross-points whose weights are one of 2ᵇ − 1 equally spaced numbers, around zero."""

    std: float = 0.0
    """The standard deviation of the noise that an update adds to every weight."""

    bits: int = 8
    """The number of bits of a weight."""

    w_max: float = 1.0
    """The largest weight."""

    @property
    def step(self) -> float:
        """The distance between two neighbouring weights."""
        return self.w_max / (2 ** (self.bits - 1) - 1)


class NoisyQuantizedCrossbar(nn.Module):
    """A crossbar of a :class:`NoisyQuantizedDevice`: W ← round(W − α·Σδᵀx + σξ), with ξ from a Gaussian distribution.

    Args:
        x_size: number of inputs.
        d_size: number of outputs.
        device: the cross-points.
        generator: the source of the noise.

    For the attributes see :class:`aimc_pl.devices.mean_field.crossbar.Crossbar`.
    """

    weight: Tensor
    hidden: Tensor

    def __init__(self, x_size: int, d_size: int, device: NoisyQuantizedDevice, generator: TableGenerator) -> None:
        super().__init__()
        self._device = device
        self._generator = generator
        self.names: list[str] = []
        self.tally = Tally()
        self.bounds = -device.w_max, device.w_max
        self.register_buffer("weight", torch.zeros(d_size, x_size), persistent=False)
        self.register_buffer("hidden", torch.zeros(0, 1, 1), persistent=False)

    def write(self, weight: Tensor) -> None:
        """Program the weights, rounded."""
        self.weight.copy_(weight)
        self._round()

    move_to = write

    def pulse(
        self, x: Tensor, error: Tensor, vectors: Vectors | Patches, learning_rate: float, update: UpdateParameters
    ) -> None:
        """Move the weights by −learning_rate·δᵀx and the noise, and round them. For the arguments see ``Crossbar``."""
        if learning_rate != 0:
            self.weight.sub_(vectors.outer(error, x), alpha=learning_rate)
            noise = gaussian(self.weight.shape, self._generator, self.weight.device)
            self.weight.add_(noise, alpha=self._device.std)
            self._round()

    def decay(self) -> None:
        """Do nothing: the weights do not leak."""

    def extra(self) -> dict[str, Tensor]:
        """Return the state that weights and parameters do not show: there is none."""
        return {}

    def load_extra(self, extra: dict[str, Tensor]) -> None:
        """Restore the state that :meth:`extra` returned."""

    def _round(self) -> None:
        step = self._device.step
        self.weight.clamp_(*self.bounds).div_(step).round_().mul_(step)


class NoisyQuantizedSimulatorTile(MeanFieldSimulatorTile):
    """A tile with a :class:`NoisyQuantizedCrossbar`."""

    def _make_crossbar(self, device: NoisyQuantizedDevice) -> Any:
        return NoisyQuantizedCrossbar(self.x_size, self.d_size, device, self._generator)
