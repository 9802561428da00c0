"""The callbacks in this module prepare overviews for TensorBoard: a picture of the schedule, and a page of charts."""

from typing import override

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from aimc_pl.arguments import check_number
from aimc_pl.callbacks.attach import get_strategy
from aimc_pl.diagram import MAX_DRAWN_CLOCKS, draw_figure


class PipelineDiagram(Callback):
    """A callback that draws the first clocks of the running schedule, as in the paper's Figure 2, for TensorBoard.

    Args:
        num_clocks: the number of clocks to draw, at most 256.
    """

    def __init__(self, num_clocks: int = 32) -> None:
        check_number("num_clocks", num_clocks, at_least=1, at_most=MAX_DRAWN_CLOCKS, whole=True)
        self.num_clocks = num_clocks

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        schedule = get_strategy(self, trainer).schedule
        # An asynchronous pipeline goes on with the micro-batches of the next mini-batches.
        batches = self.num_clocks if schedule.is_async else schedule.num_microbatches
        clocks = min(self.num_clocks, schedule.num_clocks(batches))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("pipeline", draw_figure(schedule, batches, clocks))


class Dashboard(Callback):
    """A callback that lays out the custom-scalars page of TensorBoard.

    The page has one chart each for accuracy, loss, staleness, noise, density and other values that ``Classifier``,
    ``ClockMonitor``, ``StalenessMonitor`` and ``DeviceNoise`` log.
    """

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        charts = {
            "Learning": {
                "accuracy against epoch": "by_epoch/.*accuracy",
                "accuracy against clock cycle": "by_clock/.*accuracy",
                "training loss": "train/loss_step",
            },
            "Pipeline": {
                "staleness per stage": r"staleness/stage_\d+",
                "weight drift between forward and update": r"staleness/drift_stage_\d+",
                "computation density": "clock/density",
                "speedup in clock cycles": "clock/speedup",
            },
            "Devices": {"noise per layer": "noise/.*"},
        }
        layout = {part: {title: ["Multiline", [tag]] for title, tag in tags.items()} for part, tags in charts.items()}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(layout)
