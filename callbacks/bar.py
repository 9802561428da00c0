"""The callback in this module is Lightning's progress bar, with what the pipeline does."""

import logging
import sys
from collections.abc import Sequence
from typing import Any, override

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from rich import get_console
from rich.progress import BarColumn
from torch import Tensor

from aimc_pl.callbacks.attach import attach
from aimc_pl.pipeline import Event, Observer
from aimc_pl.schedule import Operation
from aimc_pl.strategies import AnalogPipelineStrategy


class _StandardError:
    """The present ``sys.stderr``. While a bar moves, rich puts a stream there that writes above the bar."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


class PipelineBar(RichProgressBar, Observer):
    """A progress bar that shows the loss, the clock cycles, and the largest staleness of an update so far.

    The staleness is shown if one process holds all stages. The bar of another strategy shows the loss only. Lines that
    Lightning logs appear above the bar. Where a bar cannot move, such as in a file, each epoch gets a line instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, int | str | float | dict[str, float]] = {}
        self._cycles = 0
        self._staleness = 0
        self._is_log = False

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._is_log = not (get_console().is_terminal or get_console().is_jupyter)
        if self._is_log:
            self.disable()
        # Lightning's handlers keep the stream that was there when they were made, and would write into the bar.
        for name in ("lightning.fabric", "lightning.pytorch"):
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is sys.__stderr__:
                    handler.setStream(_StandardError())
        if stage == "fit" and isinstance(trainer.strategy, AnalogPipelineStrategy):
            self._strategy = attach(self, trainer)

    @override
    def configure_columns(self, trainer: "pl.Trainer") -> list[Any]:
        """Return the columns of the bar. The bar is short, so that its line has room for the numbers."""
        columns = super().configure_columns(trainer)
        for column in columns:
            if isinstance(column, BarColumn):
                column.bar_width = 10
        return columns

    @override
    def on_update(self, event: Event) -> None:
        self._staleness = max(self._staleness, event.staleness)

    @override
    def on_clock(self, clock: int, operations: Sequence[Operation]) -> None:
        self._cycles += self._strategy.schedule.cycles_per_clock

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning gives callbacks a dictionary, which is empty if the step had no loss.
        if isinstance(outputs, dict) and isinstance(outputs.get("loss"), Tensor):
            self._shown["loss"] = outputs["loss"].item()
        if self._cycles:
            self._shown["cycles"] = f"{self._cycles:,}"
            if not self._strategy.is_multiprocess:
                self._shown["staleness"] = str(self._staleness)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self._is_log and trainer.is_global_zero:
            shown = self.get_metrics(trainer, pl_module).items()
            values = [f"{name} {f'{value:.3f}' if isinstance(value, float) else value}" for name, value in shown]
            self.print(f"Epoch {trainer.current_epoch}: {', '.join(values)}")

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print at once, even into a file, which Python would write in large blocks."""
        super().print(*args, flush=True, **kwargs)

    @override
    def get_metrics(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule"
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what the bar shows: not the number of the logger's version, which is in the name of its folder."""
        return self._shown | trainer.progress_bar_metrics

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"cycles": self._cycles, "staleness": self._staleness}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._cycles, self._staleness = state_dict["cycles"], state_dict["staleness"]
