"""The callback in this module counts clock cycles, and logs how well they are used."""

from collections.abc import Sequence
from typing import Any, override

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from aimc_pl.callbacks.attach import attach
from aimc_pl.pipeline import Observer
from aimc_pl.schedule import Operation
from aimc_pl.strategies.private_lightning import epoch_metrics


class ClockMonitor(Callback, Observer):
    """A callback that counts the clock cycles of the pipeline.

    A clock cycle is the time of one forward or one backward of a micro-batch on an accelerator. At the end of every
    epoch the callback logs ``clock/cycles``, ``clock/density`` (the busy fraction of all accelerator-cycles),
    ``clock/samples_per_cycle`` and ``clock/speedup`` (over a run without a pipeline). It also writes every validation
    metric to TensorBoard as ``by_clock/…``, with the clock cycle as the step, and as ``by_epoch/…``, with the epoch.

    Attributes:
        cycles: the number of clock cycles so far, including those before a resumed checkpoint.
        operations: the number of forwards and backwards so far. Each keeps one accelerator busy for one cycle.
        samples: the number of training samples so far.
    """

    def __init__(self) -> None:
        self.cycles = 0
        self.operations = 0
        self.samples = 0

    @property
    def speedup(self) -> float:
        """The factor by which clock cycles are fewer than without a pipeline, where one operation runs at a time."""
        return self.operations / max(self.cycles, 1)

    @property
    def density(self) -> float:
        """The busy fraction of all accelerator-cycles."""
        return self.speedup / self._schedule.num_stages

    def report(self) -> str:
        """Return one line about the clock cycles of the run."""
        return (
            f"{self.cycles:,} clock cycles on {self._schedule.num_stages} accelerators (density {self.density:.2f}), "
            f"speedup {self.speedup:.2f} over no pipeline"
        )

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._strategy = attach(self, trainer)
        self._schedule = self._strategy.schedule

    @override
    def on_clock(self, clock: int, operations: Sequence[Operation]) -> None:
        self.cycles += self._schedule.cycles_per_clock
        self.operations += len(operations)

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        self.samples += self._strategy.batch_size(batch)

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        pl_module.log_dict(
            {
                "clock/cycles": float(self.cycles),
                "clock/density": self.density,
                "clock/samples_per_cycle": self.samples / max(self.cycles, 1),
                "clock/speedup": self.speedup,
            }
        )

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.sanity_checking:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, value in epoch_metrics(trainer).items():
                    logger.experiment.add_scalar(f"by_clock/{name}", value, self.cycles)
                    logger.experiment.add_scalar(f"by_epoch/{name}", value, trainer.current_epoch + 1)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"cycles": self.cycles, "operations": self.operations, "samples": self.samples}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)
