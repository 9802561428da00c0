"""The callback in this module drains the pipeline, that is, it finishes all micro-batches in flight.

It does so before others look at weights or metrics, in the cases that a training step could not foresee.
"""

from typing import Any, override

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from aimc_pl.strategies.private_lightning import may_save_now
from aimc_pl.strategies.processes import ProcessStrategy


class DrainFirst(Callback):
    """A callback that drains the pipeline, and shares metrics with the other processes, before other callbacks run.

    Args:
        strategy: the strategy of the trainer.
    """

    def __init__(self, strategy: ProcessStrategy) -> None:
        self._strategy = strategy

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if may_save_now(trainer, trainer.global_step):
            self._strategy.share_metrics(trainer)

    @override
    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._strategy.drain()

    @override
    def on_validation_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._strategy.share_metrics(trainer)

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._strategy.share_metrics(trainer)

    @override
    def on_test_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._strategy.share_metrics(trainer)

    @override
    def on_test_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._strategy.share_metrics(trainer)

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._strategy.drain()
        self._strategy.share_metrics(trainer)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._strategy.drain()
        self._strategy.share_metrics(trainer)
