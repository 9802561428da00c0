"""The tiles in this module have choppers: signs that flip from time to time, and cancel what the first crossbar adds.

Gradients send pulses to the first crossbar with the choppers' signs, and transfers undo the signs. What does not depend
on the gradients, such as the drift of asymmetric devices to the point of equal steps, changes its sign with every flip.
"""

from collections.abc import Iterable, Sequence
from math import ceil
from typing import Any

import numpy as np
import torch
from aihwkit.simulator.configs.compounds import ChoppedTransferCompound, DynamicTransferCompound
from torch import Tensor

from aimc_pl.devices.mean_field import kernels
from aimc_pl.devices.mean_field.crossbar import ROWS
from aimc_pl.devices.mean_field.pulses import DRAWN, train_settings
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

    def _update(self, x: Tensor, error: Tensor, vectors: Vectors | Patches, num_samples: int | None = None) -> None:
        if x.shape[0] == 0 or not self._update_in_one_loop(x, error, vectors):
            super()._update(x, error, vectors, num_samples)

    def _update_in_one_loop(self, x: Tensor, error: Tensor, vectors: Vectors | Patches) -> bool:
        """Send pulses and do the transfers between vectors in a compiled loop, if one can do it vector by vector.

        Small layers would take longer for the calls than for the work.

        Returns:
            Whether a loop could do this. Otherwise, nothing has happened.
        """
        if vectors is not ROWS:
            return False
        (ours, target), compound, update = self.crossbars, self._chopped, self._config.update
        rate, transfer_rate, number = self._fast_rate(), self._transfer_rate(0), x.shape[0]
        signs = self._signs()
        of_pulses = ours.pulse_arguments(x, error, vectors, rate, update, None if signs is None else signs.clone())
        of_transfers = target.column_arguments(compound.step * target.granularity, compound.transfer_update)
        if of_pulses is None or of_transfers is None or self._reads is None:
            return False
        if 0 in (self.learning_rate, rate, transfer_rate, compound.step):
            return False
        if self._num_parts(number, number, 1) < number:
            return False
        counters = {**self._counters}
        rates = self._pulse_rates(x, error, vectors, number).flatten().expand(number).numpy()
        trains = [train_settings(rate / ours.granularity, update) for rate in rates]
        if max(length for _, length, *_ in trains) > DRAWN:
            self._counters = counters
            return False
        num_reads = self._num_reads(number)
        each = (
            np.array([rate for rate, *_ in trains]),
            np.array([length for _, length, *_ in trains]),
            np.array(num_reads),
            (self._steps_per_unit(transfer_rate, rates) if any(num_reads) else 0.0) * np.ones(number),
        )
        column, cycles, cut, num_moved, lost = kernels.pulse_and_chop(
            of_pulses,
            each,
            (self._columns[0], int(self._counters["cycles"])),
            self._reads,
            self._buffer(),
            self._tracking(),
            (self._in_signs.numpy(), self._out_signs.numpy()),
            self._draw_flips(sum(num_reads)),
            of_transfers,
        )
        self._columns[0], self._counters["cycles"], self._counters["rate"] = column, cycles, float(rates[-1])
        ours.tally.add(cut, number)
        target.tally.add(lost, num_moved)
        self._add_up()
        return True

    def _num_reads(self, number: int) -> Sequence[int]:
        """Count the vectors of an update, and return how many columns are read after each."""
        num_reads, before = [], self._num_transfers()[0]
        for _ in range(number):
            self._progress.advance(1, number, 1)
            now = self._num_transfers()[0]
            num_reads.append(now - before)
            before = now
        return num_reads

    def _buffer(self) -> tuple[Any, ...]:
        """Return what :func:`kernels.pulse_and_chop` needs to know of the buffer."""
        compound = self._chopped
        kept = compound.momentum if compound.forget_buffer else min(max(compound.momentum, 0.0), 1.0)
        most = float(compound.transfer_update.desired_bl)
        return self._held.numpy(), compound.no_buffer, most, compound.forget_buffer, float(kept)

    def _tracking(self) -> tuple[Any, ...]:
        """Return what :func:`kernels.pulse_and_chop` needs to know of references, of which there are none."""
        return kernels.NOTHING, kernels.NOTHING, kernels.NOTHING[0:0].ravel(), (0.0, 0.0, 0.0)

    def _draw_flips(self, num_reads: int) -> tuple[Any, ...]:
        """Draw what :func:`kernels.pulse_and_chop` needs to flip signs after so many reads of columns."""
        flips_regularly, probability = self._flipping()
        of_outputs = max(float(self._chopped.out_chop_prob), 0.0)
        passes = (self._columns[0] + num_reads) // self.x_size if of_outputs > 0 else 0
        draws = torch.rand(num_reads if probability > 0 else 0, generator=self._generator)
        out_draws = torch.rand(passes, self.d_size, generator=self._generator)
        period = self._period() if flips_regularly else 1
        return period, flips_regularly, probability, draws.numpy(), of_outputs, out_draws.numpy()

    def _pulse(self, x: Tensor, error: Tensor, vectors: Vectors | Patches, batch: int) -> None:
        rates = self._pulse_rates(x, error, vectors, batch)
        self._counters["rate"] = last = float(rates.flatten()[-1])
        if rates.numel() > 1:
            error = error * (rates / last).to(error)
        self.crossbar.pulse(x, error, vectors, last, self._config.update, self._signs())

    def _pulse_rates(self, x: Tensor, error: Tensor, vectors: Vectors | Patches, batch: int) -> Tensor:
        """Return the rate of the pulses of every vector, or one for all, on the CPU. The running means advance."""
        compound, rate = self._chopped, self._fast_rate()
        if not (compound.auto_scale and compound.fast_lr > 0):
            return torch.tensor([rate], dtype=torch.float64)
        # A train has its full length where input and error are the largest of the recent past.
        rate *= self._config.update.desired_bl * self.crossbar.granularity
        largest = vectors.largest(x.abs()), error.abs().amax(vectors.dim, keepdim=True)
        x_means = self._running_means("x_largest", largest[0], batch)
        products = x_means * self._running_means("error_largest", largest[1], batch)
        return torch.where(products > 0, rate / products, rate)

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
        held.addcmul_(
            values, self._out_signs * self._in_signs[column], value=self._steps_per_unit(rate, self._counters["rate"])
        )
        self._send(source, column, take_steps(held, 1.0, compound))
        self._end_transfer(column, self._flips())

    def _steps_per_unit(self, rate: float, pulse_rate: Any) -> Any:
        """Return by how many steps a transfer of weights of 1 fills the buffer, for each of several pulse rates too."""
        compound = self._chopped
        fast, slow = (crossbar.granularity for crossbar in self.crossbars)
        unit = compound.buffer_granularity if compound.buffer_granularity > 0 else 1.0
        if compound.auto_granularity > 0:
            unit *= compound.auto_granularity / (self.x_size * compound.transfer_every)
        rate *= self._seen(0)
        return rate / (unit * slow * pulse_rate if compound.correct_gradient_magnitudes else unit * fast)

    def _period(self) -> int:
        """Return after how many reads of a column its sign flips, if it does so regularly."""
        return max(ceil(1 / self._chopped.in_chop_prob), 2)

    def _is_last_of_period(self) -> bool:
        return self._counters["cycles"] % self._period() + 1 == self._period()

    def _flips(self) -> bool:
        """Return whether the sign of the input that has just been read flips."""
        flips_regularly, probability = self._flipping()
        is_drawn = probability > 0 and self._happens(probability)
        return is_drawn or (flips_regularly and self._is_last_of_period())

    def _flipping(self) -> tuple[bool, float]:
        """Return whether signs of inputs flip after every period, and with which probability they flip at random."""
        probability = max(float(self._chopped.in_chop_prob), 0.0)
        return (False, probability) if self._chopped.in_chop_random else (probability > 0, 0.0)

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
        steps_per_unit = self._steps_per_unit(rate, self._counters["rate"])
        if compound.experimental_correct_accumulation:
            steps_per_unit /= min(cycles % period + 1, 1 / self.crossbar.granularity)
        signs = self._out_signs * self._in_signs[column]
        held.addcmul_(values - reference, signs, value=steps_per_unit)
        steps = take_steps(held, 1.0, compound)
        if self._cap() > 0:
            held.copy_(torch.where(steps == 0, held, held.clamp(-self._cap(), self._cap())))
        mean.lerp_(values, self._share())
        if cycles > period:
            self._send(source, column, steps)
        flips = self._flips()
        self._has_flipped[column] = float(flips)
        self._end_transfer(column, flips)

    def _flipping(self) -> tuple[bool, float]:
        return True, float(self._dynamic.in_chop_prob) if self._dynamic.in_chop_random else 0.0

    def _tracking(self) -> tuple[Any, ...]:
        """Return what :func:`kernels.pulse_and_chop` needs to know of references."""
        arrays = self._mean.numpy(), self._reference.numpy(), self._has_flipped.numpy()
        most_reads = 1 / self.crossbar.granularity if self._dynamic.experimental_correct_accumulation else 0.0
        return *arrays, (self._share(), self._cap(), most_reads)

    def _share(self) -> float:
        """Return the share of a read in the running mean."""
        return float(min(self._dynamic.tail_weightening / self._period(), 1.0))

    def _cap(self) -> float:
        """Return the limit of what remains in the buffer, or 0 for none."""
        compound = self._dynamic
        is_capped = compound.buffer_cap > 0 and not compound.forget_buffer
        return float(compound.transfer_update.desired_bl * compound.buffer_cap) if is_capped else 0.0
