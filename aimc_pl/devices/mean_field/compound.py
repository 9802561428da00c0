"""This module holds what all tiles with several crossbars share."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

import torch
from aihwkit.simulator.configs.compounds import UnitCell
from aihwkit.simulator.configs.devices import PulsedDevice
from torch import Tensor, nn

from aimc_pl.devices.mean_field.crossbar import Crossbar
from aimc_pl.devices.mean_field.tile import MeanFieldRPUConfig, MeanFieldSimulatorTile


@dataclass
class Progress:
    """How far the updates of a tile have come."""

    num_vectors: int = 0
    """The number of vectors so far."""

    num_updates: int = 0
    """The number of whole updates so far."""

    share: float = 0.0
    """The share of the present update that is done, in samples."""

    num_done: int = 0
    """The number of samples of the present update so far."""

    def advance(self, num_samples: int, batch: int, num_vectors: int) -> None:
        """Count some of the ``batch`` samples of an update (rows or images), which are so many vectors."""
        self.num_vectors += num_vectors
        self.num_done += num_samples
        self.share = self.num_done / batch
        if self.num_done >= batch:
            self.num_updates += 1
            self.num_done, self.share = 0, 0.0

    def periods(self, every: float, in_updates: bool) -> int:
        """Return how many periods of ``every`` updates, or of as many vectors, are over."""
        passed = self.num_updates + self.share if in_updates else self.num_vectors
        return floor(passed / every + 1e-9)  # on a computer, 0.3 / 0.1 is below 3


class CompoundSimulatorTile(MeanFieldSimulatorTile):
    """A tile with several crossbars. Subclasses say how they move, and how the products see them.

    Args:
        x_size: number of inputs.
        d_size: number of outputs.
        rpu_config: the configuration, whose device is one of aihwkit's unit cells.
    """

    def __init__(self, x_size: int, d_size: int, rpu_config: MeanFieldRPUConfig) -> None:
        super().__init__(x_size, d_size, rpu_config)
        _, *others = self._devices(rpu_config.device)
        self._crossbars = [self.crossbar, *map(self._make_crossbar, others)]
        self._chain = nn.ModuleList(self._crossbars)

    def _make_crossbar(self, device: Any) -> Crossbar:
        return super()._make_crossbar(self._devices(device)[0] if isinstance(device, UnitCell) else device)

    def _devices(self, cell: Any) -> Sequence[PulsedDevice]:
        """Return the devices of the crossbars."""
        return cell.unit_cell_devices

    def _add_up(self) -> None:
        """Let the products see the weights of the crossbars."""
        raise NotImplementedError

    @property
    def crossbars(self) -> Sequence[Crossbar]:
        """See :meth:`MeanFieldSimulatorTile.crossbars`."""
        return self._crossbars

    def decay(self) -> None:
        """See :meth:`MeanFieldSimulatorTile.decay`."""
        super().decay()
        self._add_up()

    def get_hidden_parameter_names(self) -> list[str]:
        """Return the names of the cross-points' parameters, each followed by the number of its crossbar."""
        return [f"{name}_{n}" for n, crossbar in enumerate(self.crossbars) for name in crossbar.names]

    def get_hidden_parameters(self) -> Tensor:
        """Return the parameters of the cross-points of all crossbars, ``(names, out, in)``."""
        return torch.cat([crossbar.hidden.expand(-1, self.d_size, self.x_size) for crossbar in self.crossbars])

    def set_hidden_parameters(self, params: Tensor) -> None:
        """Replace the parameters of the cross-points of all crossbars."""
        sizes = [len(crossbar.names) for crossbar in self.crossbars]
        for crossbar, hidden in zip(self.crossbars, params.split(sizes), strict=True):
            is_uniform = crossbar.hidden[0].numel() == 1
            crossbar.hidden = (hidden[:, :1, :1] if is_uniform else hidden).to(crossbar.hidden, copy=True)

    def dump_extra(self) -> dict[str, Any]:
        """See :meth:`MeanFieldSimulatorTile.dump_extra`."""
        return {
            "generator": self._generator.get_state(),
            "crossbars": [{"weight": one.weight.clone()} | one.extra() for one in self.crossbars],
        }

    def load_extra(self, extra: dict[str, Any], strict: bool = False) -> None:
        """See :meth:`MeanFieldSimulatorTile.load_extra`."""
        self._generator.set_state(extra["generator"].cpu())
        for crossbar, state in zip(self.crossbars, extra["crossbars"], strict=True):
            crossbar.weight.copy_(state["weight"])
            crossbar.load_extra(state)
        self._add_up()
