"""The tiles in this module have several crossbars: gradients move the first, and transfers move the others.

A transfer reads columns of one crossbar, and writes them to the next crossbar by pulses. Such algorithms are Tiki-Taka
version 1, residual learning, and Tiki-Taka version 2, which has a digital buffer between the crossbars.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from math import ceil, inf, prod
from typing import Any

import torch
from aihwkit.simulator.configs.compounds import BufferedTransferCompound, TransferCompound
from aihwkit.simulator.configs.devices import PulsedDevice
from torch import Tensor

from aimc_pl.devices.mean_field import kernels
from aimc_pl.devices.mean_field.compound import CompoundSimulatorTile, Progress
from aimc_pl.devices.mean_field.converters import is_perfect, is_simple, kernel_arguments, read_column
from aimc_pl.devices.mean_field.crossbar import ROWS, largest_reach, split
from aimc_pl.devices.mean_field.tile import MeanFieldRPUConfig
from aimc_pl.devices.mean_field.vectors import Patches, Vectors


class TransferSimulatorTile(CompoundSimulatorTile):
    """A tile with a chain of crossbars, as aihwkit's ``TransferCompound`` describes it.

    The products see Σ γₙ·Wₙ, the weighted sum of the crossbars' weights. Gradients send pulses to the first crossbar,
    W₀. With every ``transfer_every`` mini-batches, columns of crossbar n are read and added to crossbar n + 1 by
    pulses, at the rate β: Wₙ₊₁ ← Wₙ₊₁ + β·Wₙ. This is Tiki-Taka version 1 (Gokmen and Haensch, Front. Neurosci. 2020)
    if only the last crossbar is seen by the products, and residual learning (arXiv 2502.06309) otherwise.

    Args:
        x_size: number of inputs.
        d_size: number of outputs.
        rpu_config: the configuration, whose device is a ``TransferCompound``.
    """

    _sum: Tensor

    def __init__(self, x_size: int, d_size: int, rpu_config: MeanFieldRPUConfig) -> None:
        super().__init__(x_size, d_size, rpu_config)
        compound: Any = rpu_config.device
        self._compound: TransferCompound = compound
        io = compound.transfer_forward
        self._reads = kernel_arguments(io) if is_simple(io) else None
        """How compiled loops read a column, or ``None`` if they cannot."""
        count = len(self._crossbars)
        gammas = self._compound.gamma_vec or [self._compound.gamma**n for n in reversed(range(count))]
        self._gammas = tuple(map(float, gammas))
        self._is_plain = type(compound) is TransferCompound and count == 2 and not compound.random_selection
        """Whether there are two crossbars, and transfers add the columns of one to the other in their order."""
        self._columns = [0] * count
        """The column of each crossbar that is read next."""
        self._progress = Progress()
        self._is_sum = any(self._gammas[:-1])
        if self._is_sum:
            self.register_buffer("_sum", torch.zeros(d_size, x_size), persistent=False)

    def _devices(self, cell: Any) -> Sequence[PulsedDevice]:
        first, *others = cell.unit_cell_devices
        return [first, *(others[0] for _ in others)]

    @property
    def _weight(self) -> Tensor:
        return self._sum if self._is_sum else self.crossbars[-1].weight

    def set_weights(self, weight: Tensor) -> None:
        """Program the last crossbar, set the weights of the others to zero, and forget all that has been learnt."""
        *others, last = self.crossbars
        for crossbar in others:
            crossbar.write(torch.zeros_like(crossbar.weight))
        last.write(weight / self._gammas[-1])
        self._forget()
        self._add_up()

    def dump_extra(self) -> dict[str, Any]:
        """See :meth:`MeanFieldSimulatorTile.dump_extra`."""
        states = {name: state.clone() for name, state in self._states().items()}
        progress = {"num_vectors": self._progress.num_vectors, "num_updates": self._progress.num_updates}
        return super().dump_extra() | progress | {"columns": [*self._columns]} | states

    def load_extra(self, extra: dict[str, Any], strict: bool = False) -> None:
        """See :meth:`MeanFieldSimulatorTile.load_extra`."""
        self._columns = [*extra["columns"]]
        # The checkpoints of earlier versions count vectors only.
        self._progress = Progress(extra["num_vectors"], extra.get("num_updates", 0))
        for name, state in self._states().items():
            state.copy_(extra[name])
        super().load_extra(extra, strict)

    def _states(self) -> dict[str, Tensor]:
        """Return the digital numbers of the tile, by their names in a checkpoint."""
        return {}

    def _forget(self) -> None:
        """Set all that is not on a crossbar to its state in a new tile."""
        self._columns, self._progress = [0] * len(self._crossbars), Progress()
        for state in self._states().values():
            state.zero_()

    def _update(self, x: Tensor, error: Tensor, vectors: Vectors | Patches, num_samples: int | None = None) -> None:
        progress, number = self._progress, x.shape[0]
        if self.learning_rate == 0 or number == 0:
            return
        each = prod(vectors.out_size(x)) if isinstance(vectors, Patches) else 1
        batch = num_samples or number
        parts = self._num_parts(number, batch, each)
        is_up_to_date = False
        for some_x, some_error in split(parts, x, error):
            before, some = self._num_transfers(), some_x.shape[0]
            progress.advance(some, batch, some * each)
            due = [now - then for now, then in zip(self._num_transfers(), before, strict=True)]
            is_up_to_date = self._update_in_one_call(some_x, some_error, vectors, due)
            if not is_up_to_date:
                self._pulse(some_x, some_error, vectors, batch * each)
                for source, times in enumerate(due):
                    for _ in range(times):
                        self._transfer(source)
        if not is_up_to_date:
            self._add_up()

    def _update_in_one_call(self, x: Tensor, error: Tensor, vectors: Vectors | Patches, due: Sequence[int]) -> bool:
        """Send pulses, do the transfers that are due and add up the crossbars in a compiled loop, if one can do it.

        Small layers would take longer for the calls than for the work.
        """
        compound, rate = self._compound, self._fast_rate()
        if not self._is_plain or self._reads is None or due[0] > 1 or rate == 0:
            return False
        ours, target = self._crossbars
        of_pulses = ours.pulse_arguments(x, error, vectors, rate, self._config.update, furthest=largest_reach(x))
        transfer_rate = self._transfer_rate(0)
        of_transfers = target.column_arguments(transfer_rate, compound.transfer_update)
        if of_pulses is None or of_transfers is None:
            return False
        number = due[0] * min(compound.n_reads_per_transfer, self.x_size) if transfer_rate != 0 else 0
        columns, total = (self._columns[0], number), self._sum.numpy() if self._is_sum else kernels.NOTHING
        most, cut, lost = kernels.pulse_and_transfer(of_pulses, self._reads, of_transfers, columns, total, self._gammas)
        if most > of_pulses[4]:
            return False
        ours.tally.add(cut)
        target.tally.add(lost, number)
        self._columns[0] = (self._columns[0] + number) % self.x_size
        return True

    def _num_parts(self, number: int, batch: int, each: int) -> int:
        """Return into how many parts to split some samples of a batch, each of which is so many vectors.

        The order of pulses and transfers matters: a part contains one transfer of each crossbar at most, or one sample.
        """
        length = number / batch if self._compound.units_in_mbatch else number * each
        return min(number, max(1, ceil(length / self._shortest)))

    @cached_property
    def _periods(self) -> Sequence[float]:
        """The number of updates or vectors between two transfers from each crossbar to the next; 0 for none."""
        compound = self._compound
        # Each crossbar but the first is read once while the one before is read as often as it has outputs.
        growth = self.d_size / compound.n_reads_per_transfer
        numbers = range(len(self._crossbars) - 1)
        periods = compound.transfer_every_vec or [compound.transfer_every * growth**n for n in numbers]
        return [max(0, period if compound.units_in_mbatch else round(period)) for period in periods[: len(numbers)]]

    @cached_property
    def _shortest(self) -> float:
        return min(filter(None, self._periods), default=inf)

    def _num_transfers(self) -> Sequence[int]:
        """Return the number of transfers from each crossbar to the next so far."""
        progress, in_updates = self._progress, self._compound.units_in_mbatch
        return [progress.periods(every, in_updates) if every else 0 for every in self._periods]

    def _pulse(self, x: Tensor, error: Tensor, vectors: Vectors | Patches, batch: int) -> None:
        """Send pulses to the first crossbar, for a part of a mini-batch of ``batch`` vectors."""
        self.crossbar.pulse(x, error, vectors, self._fast_rate(), self._config.update, self._signs())

    def _signs(self) -> Tensor | None:
        """Return the signs of the cross-points of the first crossbar, or ``None`` if they are all 1."""
        return None

    def _fast_rate(self) -> float:
        compound = self._compound
        if compound.fast_lr <= 0:
            return self.learning_rate
        return compound.fast_lr * (self.learning_rate if compound.scale_fast_lr else 1.0)

    def _transfer_rate(self, source: int) -> float:
        compound = self._compound
        rate = compound.transfer_lr_vec[source] if compound.transfer_lr_vec else compound.transfer_lr
        return rate * self.learning_rate if compound.scale_transfer_lr else rate

    def _transfer(self, source: int) -> None:
        """Add the next columns of a crossbar to the next crossbar."""
        compound, rate = self._compound, self._transfer_rate(source)
        if rate == 0:
            return
        column = self._columns[source]
        if compound.random_selection:
            column = int(torch.randint(self.x_size, (), generator=self._generator))
        for _ in range(min(compound.n_reads_per_transfer, self.x_size)):
            self._transfer_column(source, column, rate)
            column = (column + 1) % self.x_size
        self._columns[source] = column

    def _read(self, source: int, column: int) -> Tensor:
        """Return a column ``(out,)`` of a crossbar, as its converters show it."""
        weight, io = self.crossbars[source].weight, self._compound.transfer_forward
        if weight.is_cpu and self._reads is not None:
            return read_column(weight, column, self._reads, self._generator)
        if io.inp_noise > 0 and not is_perfect(io):
            line = weight.new_zeros(1, self.x_size)
            line[0, column] = 1.0
        else:
            # Only this column contributes.
            weight = weight[:, column : column + 1]
            line = weight.new_ones(1, 1)
        return self._product(weight, line, ROWS, io, False)[0]

    def _transfer_column(self, source: int, column: int, rate: float) -> None:
        """Add rate times a column of a crossbar to the next crossbar."""
        update = self._compound.transfer_update
        ours, target = self._crossbars[source : source + 2]
        if self._reads is None or not target.add_column(column, ours.weight, self._reads, rate, update):
            target.pulse_column(column, -self._read(source, column), rate, update)

    def _happens(self, probability: float) -> bool:
        return float(torch.rand((), generator=self._generator)) < probability

    def _seen(self, source: int) -> float:
        """Return γₙ/γₙ₊₁, or 1 if the products do not see crossbar n."""
        ours, theirs = self._gammas[source : source + 2]
        return ours / theirs if ours > 0 and theirs > 0 else 1.0

    def _send(self, source: int, column: int, steps: Tensor) -> None:
        """Move a column of the crossbar after ``source`` by whole steps ``(out,)``."""
        if steps.any():
            compound: Any = self._compound
            target = self.crossbars[source + 1]
            target.pulse_column(column, -steps, compound.step * target.granularity, compound.transfer_update)

    def _add_up(self) -> None:
        if self._is_sum:
            total, of_last, out = self.crossbars[-1].weight, self._gammas[-1], self._sum
            total = total if of_last == 1 else total * of_last
            for gamma, residual in zip(self._gammas, self._residuals(), strict=False):
                total = torch.add(total, residual, alpha=gamma, out=out)

    def _residuals(self) -> Iterable[Tensor]:
        """Return what the products see of all crossbars but the last, without the weights γₙ."""
        return [crossbar.weight for crossbar in self.crossbars[:-1]]


class BufferedTransferSimulatorTile(TransferSimulatorTile):
    """A tile as aihwkit's ``BufferedTransferCompound`` describes it: Tiki-Taka version 2 (Gokmen, Front. AI 2021).

    A digital buffer H lies between two crossbars. A transfer adds β·Wₙ to a column of H, times γₙ/γₙ₊₁ if the products
    see crossbar n. Where |H| has reached a threshold, the transfer sends as many pulses to crossbar n + 1 as H contains
    whole steps.
    """

    _digital: Tensor

    def __init__(self, x_size: int, d_size: int, rpu_config: MeanFieldRPUConfig) -> None:
        super().__init__(x_size, d_size, rpu_config)
        compound: Any = rpu_config.device
        self._buffered: BufferedTransferCompound = compound
        self.register_buffer("_digital", torch.zeros(len(self._chain) - 1, x_size, d_size), persistent=False)

    def _states(self) -> dict[str, Tensor]:
        return {"digital": self._digital}

    def _transfer_column(self, source: int, column: int, rate: float) -> None:
        compound, target = self._buffered, self.crossbars[source + 1]
        threshold = compound.thres_scale * target.granularity
        held = self._digital[source, column].add_(self._read(source, column), alpha=rate * self._seen(source))
        self._send(source, column, take_steps(held, threshold, compound))


def take_steps(held: Tensor, threshold: float, compound: Any) -> Tensor:
    """Take whole steps out of a digital buffer, and return their numbers.

    Args:
        held: the values of the buffer. They change in place.
        threshold: the value of a step.
        compound: how many steps may be taken at once, and what then remains in the buffer.
    """
    most = compound.transfer_update.desired_bl
    steps = (held / threshold).trunc_().clamp_(-most, most)
    if compound.forget_buffer:
        held.copy_(torch.where(steps == 0, held, held * compound.momentum))
    else:
        held.sub_(steps, alpha=(1 - min(max(compound.momentum, 0.0), 1.0)) * threshold)
    return steps
