"""The tile in this module tracks the symmetric points of a crossbar, and subtracts them from what it has learnt.

At its symmetric point, a cross-point moves up and down by equal steps. The noise of gradients pulls every weight there.
So a crossbar that receives gradients holds their sum, and its symmetric points. The signs of the gradients flip from
time to time, so that gradients cancel in a running mean of the weights, and the symmetric points remain.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from aihwkit.simulator.configs.compounds import TransferCompound
from torch import Tensor

from aimc_pl.devices.mean_field.tile import MeanFieldRPUConfig
from aimc_pl.devices.mean_field.transfer import TransferSimulatorTile
from aimc_pl.errors import UsageError


@dataclass
class TrackingCompound(TransferCompound):
    """Two crossbars between which a :class:`TrackingSimulatorTile` transfers. aihwkit's own tiles cannot."""

    chop_prob: float = 0.1
    """The probability that the sign of a column flips after the column has been read."""

    tracking_rate: float = 0.1
    """The share of a read in the new estimate of the symmetric points."""

    def as_bindings(self, data_type: Any) -> NoReturn:
        """Refuse to be simulated by aihwkit, which would transfer without the estimate.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "aihwkit's own tiles do not track symmetric points: choose backend='mean_field' or 'bits', or pass the "
            "configuration through to_mean_field"
        )


class TrackingSimulatorTile(TransferSimulatorTile):
    """A tile with two crossbars, P and W, and a digital estimate Q of the symmetric points of P.

    This is E-RIDER (arXiv 2602.21321). Every input k has a sign cₖ. Gradients move column k of P in the direction of
    cₖ. A transfer reads the column, and W[:, k] ← W[:, k] + β·cₖ·(P[:, k] − Q[:, k]) by pulses. After this,
    Q[:, k] ← (1 − η)·Q[:, k] + η·P[:, k], and cₖ may flip. The products see W + γ·c·(P − Q).

    Args:
        x_size: number of inputs.
        d_size: number of outputs.
        rpu_config: the configuration, whose device is a :class:`TrackingCompound`.
    """

    _point: Tensor
    _in_signs: Tensor

    def __init__(self, x_size: int, d_size: int, rpu_config: MeanFieldRPUConfig) -> None:
        super().__init__(x_size, d_size, rpu_config)
        compound: Any = rpu_config.device
        self._tracking: TrackingCompound = compound
        self.register_buffer("_point", torch.zeros(d_size, x_size), persistent=False)
        self.register_buffer("_in_signs", torch.ones(x_size), persistent=False)

    def _states(self) -> dict[str, Tensor]:
        return {"point": self._point, "in_signs": self._in_signs}

    def _forget(self) -> None:
        super()._forget()
        self._in_signs.fill_(1.0)

    def _signs(self) -> Tensor | None:
        return self._in_signs[None] if self._tracking.chop_prob > 0 else None

    def _transfer_column(self, source: int, column: int, rate: float) -> None:
        point, sign, values = self._point[:, column], self._in_signs[column], self._read(source, column)
        error = (point - values) * sign
        self.crossbars[source + 1].pulse_column(column, error, rate, self._tracking.transfer_update)
        point.lerp_(values, self._tracking.tracking_rate)
        if self._tracking.chop_prob > 0 and self._happens(self._tracking.chop_prob):
            sign.neg_()

    def _residuals(self) -> Iterable[Tensor]:
        return [(self.crossbar.weight - self._point) * self._in_signs]
