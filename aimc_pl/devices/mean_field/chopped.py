"""The tiles in this module have choppers: signs that flip from time to time, and cancel what the first crossbar adds.

Gradients send pulses to the first crossbar with the choppers' signs, and transfers undo the signs. What does not depend
on the gradients, such as the drift of asymmetric devices to the point of equal steps, changes its sign with every flip.
"""

from collections.abc import Iterable
from math import ceil
from typing import Any

import torch
from aihwkit.simulator.configs.compounds import ChoppedTransferCompound, DynamicTransferCompound
from torch import Tensor

from aimc_pl.devices.mean_field import kernels
from aimc_pl.devices.mean_field.tile import MeanFieldRPUConfig
from aimc_pl.devices.mean_field.transfer import TransferSimulatorTile, take_steps
from aimc_pl.devices.mean_field.vectors import Patches, Vectors


class ChoppedTransferSimulatorTile(TransferSimulatorTile):
    """A tile as aihwkit's ``ChoppedTransferCompound`` describes it: Tiki-Taka version 2 with choppers.

    Every input k has a sign sₖ, and every output j a sign tⱼ. Gradients move weight (j, k) of the first crossbar in the
    direction sₖ·tⱼ. A transfer adds sₖ·tⱼ·β times column k to a digital buffer in units of steps, sends as many pulses
    to the second crossbar as the buffer contains whole steps, and may flip sₖ. Output signs flip after the last column.

    Args:
        x_size: number of inputs.
        d_size: number of outputs.
        rpu_config: the configuration, whose device is a ``ChoppedTransferCompound``.
    """

    _held: Tensor
    _in_signs: Tensor
    _out_signs: Tensor

    def __init__(self, x_size: int, d_size: int, rpu_config: MeanFieldRPUConfig) -> None:
        super().__init__(x_size, d_size, rpu_config)
        compound: Any = rpu_config.device
        self._chopped: ChoppedTransferCompound = compound
        self.register_buffer("_held", torch.zeros(x_size, d_size), persistent=False)
        self.register_buffer("_in_signs", torch.ones(x_size), persistent=False)
        self.register_buffer("_out_signs", torch.ones(d_size), persistent=False)
        self._counters: dict[str, float] = {"cycles": 0, "rate": 0.0, "x_largest": 0.0, "error_largest": 0.0}
        """Transfers of the last column, the last rate of pulses, and running means of the largest input and error."""

    def dump_extra(self) -> dict[str, Any]:
        """See :meth:`MeanFieldSimulatorTile.dump_extra`."""
        return super().dump_extra() | {"counters": {**self._counters}}

    def load_extra(self, extra: dict[str, Any], strict: bool = False) -> None:
        """See :meth:`MeanFieldSimulatorTile.load_extra`."""
        self._counters = {**extra["counters"]}
        super().load_extra(extra, strict)

    def _states(self) -> dict[str, Tensor]:
        return {"buffer": self._held, "in_signs": self._in_signs, "out_signs": self._out_signs}

    def _forget(self) -> None:
        super()._forget()
        self._in_signs.fill_(1.0)
        self._out_signs.fill_(1.0)
        self._counters = dict.fromkeys(self._counters, 0)

    def _signs(self) -> Tensor | None:
        if self._chopped.in_chop_prob <= 0 and self._chopped.out_chop_prob <= 0:
            return None
        if self._chopped.out_chop_prob <= 0:
            return self._in_signs[None]
        return torch.outer(self._out_signs, self._in_signs)

    def _pulse(self, x: Tensor, error: Tensor, vectors: Vectors | Patches, batch: int) -> None:
        compound, counters = self._chopped, self._counters
        counters["rate"] = self._fast_rate()
        if compound.auto_scale and compound.fast_lr > 0:
            # A train has its full length where input and error are the largest of the recent past.
            counters["rate"] *= self._config.update.desired_bl * self.crossbar.granularity
            largest = vectors.largest(x.abs()), error.abs().amax(vectors.dim, keepdim=True)
            x_means = self._running_means("x_largest", largest[0], batch)
            error_means = self._running_means("error_largest", largest[1], batch)
            products = x_means * error_means
            last = counters["x_largest"] * counters["error_largest"]
            if last > 0:
                counters["rate"] /= last
                if products.numel() > 1:  # the quotient of a single vector is 1
                    error = error * (last / products).to(error)
        self.crossbar.pulse(x, error, vectors, counters["rate"], self._config.update, self._signs())

    def _running_means(self, name: str, values: Tensor, batch: int) -> Tensor:
        """Return the running mean after each of some values, on the CPU, and keep the last."""
        kept = 1 - (1 - self._chopped.auto_momentum) / batch
        means = kernels.running_means(kernels.array(values.cpu().flatten()), self._counters[name], kept)
        self._counters[name] = float(means[-1])
        return torch.from_numpy(means).view_as(values)

    def _transfer_column(self, source: int, column: int, rate: float) -> None:
        compound, held, values = self._chopped, self._held[column], self._read(source, column)
        if compound.no_buffer:
            held.zero_()
        held.addcmul_(values, self._out_signs * self._in_signs[column], value=self._steps_per_unit(rate))
        self._send(source, column, take_steps(held, 1.0, compound))
        self._end_transfer(column, self._flips())

    def _steps_per_unit(self, rate: float) -> float:
        """Return by how many steps a transfer of weights of 1 fills the buffer."""
        compound = self._chopped
        fast, slow = (crossbar.granularity for crossbar in self.crossbars)
        unit = compound.buffer_granularity if compound.buffer_granularity > 0 else 1.0
        if compound.auto_granularity > 0:
            unit *= compound.auto_granularity / (self.x_size * compound.transfer_every)
        rate *= self._seen(0)
        return rate / (unit * slow * self._counters["rate"] if compound.correct_gradient_magnitudes else unit * fast)

    def _period(self) -> int:
        """Return after how many reads of a column its sign flips, if it does so regularly."""
        return max(ceil(1 / self._chopped.in_chop_prob), 2)

    def _is_last_of_period(self) -> bool:
        return self._counters["cycles"] % self._period() + 1 == self._period()

    def _flips(self) -> bool:
        """Return whether the sign of the input that has just been read flips."""
        compound = self._chopped
        if compound.in_chop_prob <= 0:
            return False
        return self._happens(compound.in_chop_prob) if compound.in_chop_random else self._is_last_of_period()

    def _end_transfer(self, column: int, flips: bool) -> None:
        if flips:
            self._in_signs[column] *= -1
        if column < self.x_size - 1:
            return
        self._counters["cycles"] += 1
        if self._chopped.out_chop_prob > 0:
            drawn = torch.rand(self.d_size, generator=self._generator) < self._chopped.out_chop_prob
            self._out_signs[drawn.to(self._out_signs.device)] *= -1

    def _residuals(self) -> Iterable[Tensor]:
        signs, fast = self._signs(), self.crossbar.weight
        return [fast if signs is None else fast * signs]


class DynamicTransferSimulatorTile(ChoppedTransferSimulatorTile):
    """A tile as aihwkit's ``DynamicTransferCompound`` describes it: AGAD (Rasch et al., arXiv 2303.04721).

    A transfer adds the difference between a column and its reference to the buffer. The reference is the running mean
    of the reads until the column's sign flipped last.
    """

    _mean: Tensor
    _reference: Tensor
    _has_flipped: Tensor

    def __init__(self, x_size: int, d_size: int, rpu_config: MeanFieldRPUConfig) -> None:
        super().__init__(x_size, d_size, rpu_config)
        compound: Any = rpu_config.device
        self._dynamic: DynamicTransferCompound = compound
        self.register_buffer("_mean", torch.zeros(x_size, d_size), persistent=False)
        self.register_buffer("_reference", torch.zeros(x_size, d_size), persistent=False)
        self.register_buffer("_has_flipped", torch.zeros(x_size), persistent=False)

    def _states(self) -> dict[str, Tensor]:
        own = {"mean": self._mean, "reference": self._reference, "has_flipped": self._has_flipped}
        return super()._states() | own

    def _transfer_column(self, source: int, column: int, rate: float) -> None:
        compound, held, mean = self._dynamic, self._held[column], self._mean[column]
        values = self._read(source, column)
        period, cycles = self._period(), self._counters["cycles"]
        reference = torch.where(self._has_flipped[column] > 0, mean, self._reference[column])
        self._reference[column] = reference
        steps_per_unit = self._steps_per_unit(rate)
        if compound.experimental_correct_accumulation:
            steps_per_unit /= min(cycles % period + 1, 1 / self.crossbar.granularity)
        signs = self._out_signs * self._in_signs[column]
        held.addcmul_(values - reference, signs, value=steps_per_unit)
        steps = take_steps(held, 1.0, compound)
        if compound.buffer_cap > 0 and not compound.forget_buffer:
            most = compound.transfer_update.desired_bl * compound.buffer_cap
            held.copy_(torch.where(steps == 0, held, held.clamp(-most, most)))
        mean.lerp_(values, min(compound.tail_weightening / period, 1.0))
        if cycles > period:
            self._send(source, column, steps)
        flips = self._flips()
        self._has_flipped[column] = float(flips)
        self._end_transfer(column, flips)

    def _flips(self) -> bool:
        drawn = self._dynamic.in_chop_random and self._happens(self._dynamic.in_chop_prob)
        return self._is_last_of_period() or drawn
