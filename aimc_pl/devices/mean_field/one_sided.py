"""The tile in this module has pairs of one-sided devices, such as phase-change memory, which is hard to move down.

A weight is the difference of two devices. Both get pulses of one direction only, so both approach a bound. From time to
time a refresh therefore resets those pairs of which both are far up, and writes their difference again.
"""

from collections.abc import Sequence
from copy import deepcopy
from math import ceil, prod
from typing import Any

import torch
from aihwkit.simulator.configs.compounds import OneSidedUnitCell
from aihwkit.simulator.configs.devices import PulsedDevice
from torch import Tensor

from aimc_pl.devices.mean_field.compound import CompoundSimulatorTile, Progress
from aimc_pl.devices.mean_field.converters import has_bound_management, is_perfect
from aimc_pl.devices.mean_field.crossbar import ROWS, Crossbar, split
from aimc_pl.devices.mean_field.tile import MeanFieldRPUConfig
from aimc_pl.devices.mean_field.vectors import Patches, Vectors


class OneSidedSimulatorTile(CompoundSimulatorTile):
    """A tile with two crossbars, P and M, whose products see P − M, as aihwkit's ``OneSidedUnitCell`` describes it.

    Gradients that make a weight larger send pulses to P, and all others to M. Pulses are whole numbers, and move a
    device one after another, because M rests at its lower bound where a weight has only been positive.

    After every ``refresh_every`` mini-batches (or vectors), P and M are read. Where the larger one is above the upper
    threshold and the other above the lower one, in units of the largest weight, both are reset, and P − M is written to
    one of them by pulses.

    With ``copy_inverted``, M consists of devices equal to those of P, which get pulses down: the second crossbar holds
    −M.

    Args:
        x_size: number of inputs.
        d_size: number of outputs.
        rpu_config: the configuration, whose device is a ``OneSidedUnitCell``.

    Attributes:
        signs: the direction of the pulses of each crossbar, 1 for up, and the sign of its weights.
    """

    _difference: Tensor

    def __init__(self, x_size: int, d_size: int, rpu_config: MeanFieldRPUConfig) -> None:
        super().__init__(x_size, d_size, rpu_config)
        cell: Any = rpu_config.device
        self._cell: OneSidedUnitCell = cell
        self.signs = (1, -1) if cell.copy_inverted else (1, 1)
        self._progress = Progress()
        if cell.copy_inverted:
            self.crossbars[1].hidden.copy_(self.crossbar.hidden)
        self.register_buffer("_difference", torch.zeros(d_size, x_size), persistent=False)

    def _devices(self, cell: Any) -> Sequence[PulsedDevice]:
        devices = [deepcopy(cell.unit_cell_devices[0]) for _ in range(2)]
        seed = cell.construction_seed or devices[0].construction_seed
        for n, device in enumerate(devices):
            device.construction_seed = seed and seed + n
        return devices

    @property
    def _weight(self) -> Tensor:
        return self._difference

    def set_weights(self, weight: Tensor) -> None:
        """Program positive weights on P and negative ones on M, and the other device of each pair to zero."""
        for sign, crossbar, part in zip(self.signs, self.crossbars, _parts(weight), strict=True):
            crossbar.write(sign * part)
        self._progress = Progress()
        self._add_up()

    def dump_extra(self) -> dict[str, Any]:
        """See :meth:`MeanFieldSimulatorTile.dump_extra`."""
        progress = {"num_vectors": self._progress.num_vectors, "num_updates": self._progress.num_updates}
        return super().dump_extra() | progress

    def load_extra(self, extra: dict[str, Any], strict: bool = False) -> None:
        """See :meth:`MeanFieldSimulatorTile.load_extra`."""
        super().load_extra(extra, strict)
        # The checkpoints of earlier versions count vectors only.
        self._progress = Progress(extra["num_vectors"], extra.get("num_updates", 0))

    def _update(self, x: Tensor, error: Tensor, vectors: Vectors | Patches, num_samples: int | None = None) -> None:
        if self.learning_rate == 0:
            return
        each = prod(vectors.out_size(x)) if isinstance(vectors, Patches) else 1
        batch, progress = num_samples or len(x), self._progress
        every, in_updates = self._cell.refresh_every, self._cell.units_in_mbatch
        # The order of pulses and refreshes matters: split the batch if several refreshes fall into it.
        parts = min(len(x), ceil(len(x) * each / every)) if every and not in_updates else 1
        tally = self.crossbar.tally
        tally.num_updates += 1
        for some_x, some_error in split(parts, x, error):
            cut = self._send(some_x, some_error, vectors, self.learning_rate, self._config.update)
            tally.cut += cut / parts
            before = every and progress.periods(every, in_updates)
            progress.advance(len(some_x), batch, len(some_x) * each)
            if every and progress.periods(every, in_updates) > before:
                self._refresh()
        self._add_up()

    def _send(self, x: Tensor, error: Tensor, vectors: Vectors | Patches, rate: float, update: Any) -> Tensor | float:
        """Move P by the pulses up and M by the pulses down. Return the share of the pulses that trains cannot hold."""
        *pulses, cut = self.crossbar.draw_pulses(x, error, vectors, rate, update)
        for sign, crossbar, some in zip(self.signs, self.crossbars, pulses, strict=True):
            crossbar.move_one_way(some, upward=sign > 0)
        return cut

    def _refresh(self) -> None:
        """Reset the pairs of which both devices are far up, and write their differences again."""
        cell = self._cell
        plus, minus = (sign * self._read(crossbar) for sign, crossbar in zip(self.signs, self.crossbars, strict=True))
        w_max = cell.unit_cell_devices[0].w_max
        due = torch.maximum(plus, minus) / w_max > cell.refresh_upper_thres
        due &= torch.minimum(plus, minus) / w_max > cell.refresh_lower_thres
        if not due.any():
            return
        for sign, crossbar in zip(self.signs, self.crossbars, strict=True):
            crossbar.reset(due, sign)
        columns = due.any(0).nonzero()[:, 0]
        lines = torch.eye(self.x_size, device=columns.device)[columns]
        # The pulse trains of the two crossbars are chosen one by one.
        plus_part, minus_part = _parts(torch.where(due, plus - minus, 0.0)[:, columns].T)
        for error in (-plus_part, minus_part):
            self._send(lines, error, ROWS, 1.0, cell.refresh_update)

    def _read(self, crossbar: Crossbar) -> Tensor:
        """Return the weights ``(out, in)`` of a crossbar, as converters show them, column by column."""
        weight, io = crossbar.weight, self._cell.refresh_forward
        if is_perfect(io):
            return weight * io.out_scale
        lines = torch.eye(self.x_size, device=weight.device)
        return self._product(weight, lines, ROWS, io, has_bound_management(io)).T

    def _add_up(self) -> None:
        (_, plus), (sign, minus) = zip(self.signs, self.crossbars, strict=True)
        torch.sub(plus.weight, minus.weight, alpha=sign, out=self._difference)


def _parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positive and the negative part of weights, both as positive numbers."""
    return weight.clamp(min=0), (-weight).clamp(min=0)
