"""The callbacks in this module prepare overviews for TensorBoard: a picture of the schedule, and a page of charts."""

import re
from typing import Any, override

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from aimc_pl.arguments import check_number
from aimc_pl.callbacks.attach import get_strategy
from aimc_pl.callbacks.clock import ClockMonitor
from aimc_pl.diagram import MAX_DRAWN_CLOCKS, MAX_DRAWN_STAGES, draw_thumbnail
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.strategies.private_lightning import should_log

_CHARTS = {
    "Progress": {
        "validation metrics against clock cycles": r"by_clock/(?!.*loss)",
        "validation metrics against epochs": r"by_epoch/(?!.*loss)",
        "validation loss against clock cycles": r"by_clock/(?!train_loss$).*loss",
        "training loss against clock cycles": r"by_clock/train_loss$",
        "learning rate against steps": r"lr-",
        "metrics against nanoseconds of the hardware": r"by_time/(?!.*loss)",
        "metrics against nanojoules of the hardware": r"by_energy/(?!.*loss)",
    },
    "Staleness": {
        "staleness of updates, per stage": r"staleness(/stage_\d+)?$",
        "relative drift of weights, per stage": r"staleness/drift",
        "cosine of stale and current gradients, per stage": r"staleness/cosine",
    },
    "Devices": {
        "use of the devices' range, per stage": r"devices/range",
        "relative noise of weights, per stage": r"devices/noise",
    },
}
"""The charts of the page, by category and title: a regular expression for the tags."""


class PipelineDiagram(Callback):
    """A callback that draws the first clocks of the running schedule, as in the paper's Figure 2, for TensorBoard.

    Args:
        num_clocks: the number of clocks to draw, at most 256. The default shows a mini-batch from the fill to its
            update, as far as 96 clocks. An asynchronous pipeline does not end there: it is drawn for 3 clocks per
            stage, but at least 12 and at most 96.
    """

    def __init__(self, num_clocks: int | None = None) -> None:
        if num_clocks is not None:
            check_number("num_clocks", num_clocks, at_least=1, at_most=MAX_DRAWN_CLOCKS, whole=True)
        self.num_clocks = num_clocks

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        schedule = get_strategy(self, trainer).schedule
        shown = max(12, 3 * schedule.num_stages) if schedule.is_async else schedule.num_clocks()
        clocks = self.num_clocks or min(shown, 3 * MAX_DRAWN_STAGES)
        # An asynchronous pipeline goes on with the micro-batches of the next mini-batches.
        batches = clocks if schedule.is_async else schedule.num_microbatches
        clocks = min(clocks, schedule.num_clocks(batches))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("pipeline", draw_thumbnail(schedule, batches, clocks))


class Dashboard(Callback):
    """A callback that lays out the custom-scalars page of TensorBoard.

    The page has charts in three parts: progress, staleness and devices. They show what ``ClockMonitor``,
    ``StalenessMonitor``, ``DeviceMonitor``, ``DeviceNoise`` and Lightning's ``LearningRateMonitor`` log, and the losses
    and metrics of the module. A chart comes when there is something to see in it. There are no charts of staleness
    if the schedule has none. With the logger ``RunBoard``, every stage has its own colour.
    """

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._tags: set[str] = set()
        self._layout: dict[str, dict[str, list[Any]]] = {}
        strategy = trainer.strategy
        self._is_stale = isinstance(strategy, AnalogPipelineStrategy) and strategy.schedule.max_staleness(0) > 0

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if should_log(trainer):
            self._lay_out(trainer)

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._lay_out(trainer)

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._lay_out(trainer)

    def _lay_out(self, trainer: "pl.Trainer") -> None:
        """Write the layout of all charts that have something to show, if it has become another."""
        callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue], set later
        self._tags.update(trainer.callback_metrics)
        self._tags.update(*(callback.tags for callback in callbacks if isinstance(callback, ClockMonitor)))
        layout = {
            part: {title: ["Multiline", [tag]] for title, tag in charts.items() if self._has(tag)}
            for part, charts in _CHARTS.items()
            if part != "Staleness" or self._is_stale
        }
        layout = {part: charts for part, charts in layout.items() if charts}
        if layout != self._layout:
            self._layout = layout
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_custom_scalars(layout)

    def _has(self, pattern: str) -> bool:
        return any(re.match(pattern, tag) for tag in self._tags)
