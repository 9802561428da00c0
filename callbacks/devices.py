"""The callback in this module shows how analog devices use their range."""

from collections.abc import Sequence
from typing import Any, override

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from aimc_pl.analog import is_analog
from aimc_pl.callbacks.attach import attach, merged
from aimc_pl.callbacks.run_board import add_histogram
from aimc_pl.pipeline import Observer
from aimc_pl.stage import StageInfo
from aimc_pl.strategies.private_lightning import should_log

_NUM_BARS = 40


class DeviceMonitor(Callback, Observer):
    """A callback that shows where the weights of analog layers are in the range of their devices.

    A position is -1 at the lower bound of a cross-point, 0 in the middle of its range and 1 at the upper bound. For
    each stage m with analog layers the callback logs ``devices/range_stage_m``, the mean distance of the positions from
    0. Where it comes close to 1, weights are stuck at their bounds. At the end of every epoch TensorBoard also gets a
    histogram of the positions, ``devices/positions_stage_m``. Layers on aihwkit's own tiles do not count.
    """

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if stage == "fit":
            self._strategy = attach(self, trainer)

    @override
    def on_start(self, stages: Sequence[StageInfo]) -> None:
        self._layers = {stage.index: [layer for layer in stage.modules if is_analog(layer)] for stage in stages}

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if should_log(trainer):
            ranges = {stage: positions.abs().mean().item() for stage, positions in self._positions().items()}
            for stage, value in merged(self._strategy.gather(ranges)).items():
                pl_module.log(f"devices/range_stage_{stage}", value, on_step=True, on_epoch=False)

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        edges = torch.linspace(-1, 1, _NUM_BARS + 1)
        counts = {stage: _counts(positions) for stage, positions in self._positions().items()}
        for stage, bars in merged(self._strategy.gather(counts)).items():
            add_histogram(trainer, f"devices/positions_stage_{stage}", edges.tolist(), bars)

    def _positions(self) -> dict[int, Tensor]:
        """Return the positions of all weights of each stage of this process that has any."""
        if not any(self._layers.values()):
            return {}
        # This imports aihwkit, which only analog networks need.
        from aimc_pl.devices.saturation import positions

        all_positions = {
            stage: [position for layer in layers for position in positions(layer)]
            for stage, layers in self._layers.items()
        }
        return {stage: torch.cat(parts) for stage, parts in all_positions.items() if parts}


def _counts(positions: Tensor) -> list[float]:
    return torch.histc(positions.clamp(-1, 1), _NUM_BARS, -1, 1).tolist()
