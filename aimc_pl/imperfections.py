"""This module models imperfections of analog devices as operations on weights."""

from abc import ABC, abstractmethod

import torch
from torch import Generator, Tensor

from aimc_pl.arguments import check_number


class Imperfection:
    """An imperfection of devices, whose attributes are its arguments."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


class WeightNoise(Imperfection, ABC):
    """An imperfection that changes the weights of a stage after each update."""

    @abstractmethod
    def apply(self, weight: Tensor, before: Tensor, cycles: int, generator: Generator, devices: Generator) -> Tensor:
        """Return the weight as the imperfect devices hold it.

        Args:
            weight: the weight after the update.
            before: the weight before the update.
            cycles: the number of clock cycles since the last update.
            generator: draws what differs from update to update.
            devices: draws what is fixed for each device. It starts from the same state at every update of a layer.
        """


class WriteNoise(WeightNoise):
    """Gaussian noise that every update adds to the weights.

    Args:
        std: the standard deviation of the noise, in weight units.
    """

    def __init__(self, std: float) -> None:
        check_number("std", std, at_least=0)
        self.std = std

    def apply(self, weight: Tensor, before: Tensor, cycles: int, generator: Generator, devices: Generator) -> Tensor:
        """Return the weight with noise added; for the arguments see :meth:`WeightNoise.apply`."""
        return weight + self.std * _normal(weight, generator)


class Drift(WeightNoise):
    """Conductance that decays by the power law g(t) = g₀·(1 + t/t₀)^−ν until the next update programs it again.

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
        """Return the weight after the decay; for the arguments see :meth:`WeightNoise.apply`."""
        return weight * (1 + cycles / self.t0) ** -self.nu


class StuckAt(WeightNoise):
    """Devices that cannot be programmed.

    Args:
        fraction: the fraction of all devices that are stuck, between 0 and 1.
        value: the weight at which these devices are stuck, in weight units.
    """

    def __init__(self, fraction: float, value: float = 0.0) -> None:
        check_number("fraction", fraction, at_least=0, at_most=1)
        check_number("value", value)
        self.fraction = fraction
        self.value = value

    def apply(self, weight: Tensor, before: Tensor, cycles: int, generator: Generator, devices: Generator) -> Tensor:
        """Return the weight with the stuck devices at their value; for the arguments see :meth:`WeightNoise.apply`."""
        stuck = torch.rand(weight.shape, generator=devices).to(weight.device) < self.fraction
        return weight.masked_fill(stuck, self.value)


class DeviceVariation(WeightNoise):
    """Devices that answer the same update with steps of different sizes. Each device has a gain, on average 1.

    Args:
        std: the standard deviation of the gain.
    """

    def __init__(self, std: float) -> None:
        check_number("std", std, at_least=0)
        self.std = std

    def apply(self, weight: Tensor, before: Tensor, cycles: int, generator: Generator, devices: Generator) -> Tensor:
        """Return the weight after steps with these gains; for the arguments see :meth:`WeightNoise.apply`."""
        return before + (1 + self.std * _normal(weight, devices)) * (weight - before)


class ReadNoise(Imperfection):
    """Gaussian noise on the weights, drawn separately for every product in a forward or a backward.

    Args:
        std: the standard deviation of the noise, in weight units.
    """

    def __init__(self, std: float) -> None:
        check_number("std", std, at_least=0)
        self.std = std

    def draw(self, weight: Tensor, generator: Generator) -> Tensor:
        """Return the noise of one product, a tensor of the weight's shape."""
        return self.std * _normal(weight, generator)


Noise = WeightNoise | ReadNoise


def _normal(like: Tensor, generator: Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)
