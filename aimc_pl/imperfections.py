"""Imperfections of analog devices, as operations on weights."""

from abc import ABC, abstractmethod

import torch
from torch import Generator, Tensor

from aimc_pl.arguments import check_number


class WeightNoise(ABC):
    """An imperfection that shows when a stage has updated its weights."""

    @abstractmethod
    def apply(self, weight: Tensor, before: Tensor, cycles: int, generator: Generator, devices: Generator) -> Tensor:
        """The weight as the imperfect devices hold it.

        Args:
            weight: after the update.
            before: before the update.
            cycles: clock cycles since the last update.
            generator: for what differs from update to update.
            devices: for what is fixed per device; it starts from the same state at every update of a layer.
        """


class WriteNoise(WeightNoise):
    """Every update leaves the weights with Gaussian noise added.

    Args:
        std: standard deviation, in weight units.
    """

    def __init__(self, std: float) -> None:
        check_number("std", std, at_least=0)
        self.std = std

    def apply(self, weight: Tensor, before: Tensor, cycles: int, generator: Generator, devices: Generator) -> Tensor:
        """See :meth:`WeightNoise.apply`."""
        return weight + self.std * _normal(weight, generator)


class Drift(WeightNoise):
    """Conductance decays between updates by the power law g(t) = g₀·(1 + t/t₀)^−ν; an update programs it anew.

    Args:
        nu: ν, the exponent.
        t0: t₀, in clock cycles.
    """

    def __init__(self, nu: float, t0: float = 1.0) -> None:
        check_number("nu", nu, at_least=0)
        check_number("t0", t0, above=0)
        self.nu = nu
        self.t0 = t0

    def apply(self, weight: Tensor, before: Tensor, cycles: int, generator: Generator, devices: Generator) -> Tensor:
        """See :meth:`WeightNoise.apply`."""
        return weight * (1 + cycles / self.t0) ** -self.nu


class StuckAt(WeightNoise):
    """Some devices cannot be programmed.

    Args:
        fraction: of the devices, between 0 and 1.
        value: what they are stuck at, in weight units.
    """

    def __init__(self, fraction: float, value: float = 0.0) -> None:
        check_number("fraction", fraction, at_least=0, at_most=1)
        check_number("value", value)
        self.fraction = fraction
        self.value = value

    def apply(self, weight: Tensor, before: Tensor, cycles: int, generator: Generator, devices: Generator) -> Tensor:
        """See :meth:`WeightNoise.apply`."""
        stuck = torch.rand(weight.shape, generator=devices).to(weight.device) < self.fraction
        return weight.masked_fill(stuck, self.value)


class DeviceVariation(WeightNoise):
    """Devices answer to the same update with steps of different size: each has a gain of its own, of mean 1.

    Args:
        std: standard deviation of the gain.
    """

    def __init__(self, std: float) -> None:
        check_number("std", std, at_least=0)
        self.std = std

    def apply(self, weight: Tensor, before: Tensor, cycles: int, generator: Generator, devices: Generator) -> Tensor:
        """See :meth:`WeightNoise.apply`."""
        return before + (1 + self.std * _normal(weight, devices)) * (weight - before)


class ReadNoise:
    """Every forward and every backward product sees the weights with Gaussian noise of its own.

    Args:
        std: standard deviation, in weight units.
    """

    def __init__(self, std: float) -> None:
        check_number("std", std, at_least=0)
        self.std = std

    def draw(self, weight: Tensor, generator: Generator) -> Tensor:
        """The noise of one product, of the weight's shape."""
        return self.std * _normal(weight, generator)


Noise = WeightNoise | ReadNoise


def _normal(like: Tensor, generator: Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)
