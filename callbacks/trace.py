"""The callback in this module writes a trace of a real run, for Perfetto and Chrome."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, override

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from aimc_pl.arguments import check_number, check_path
from aimc_pl.callbacks.attach import attach
from aimc_pl.cost import Span, Timeline
from aimc_pl.cost.trace import trace_events, write_trace
from aimc_pl.errors import UsageError
from aimc_pl.pipeline import Event, Observer
from aimc_pl.schedule import Operation


class TraceWriter(Callback, Observer):
    """A callback that writes when each stage did what, as a trace that https://ui.perfetto.dev opens.

    An operation is shown from the end of the one before in the same process, or from the begin of the mini-batch, to
    its own end. Where stages are processes, this includes waiting for neighbours. Schedules that update all stages at
    once show the time of the update at the first stage. A run computes the gradients of weights in the backward, under
    ``"zero_bubble"`` too, and they have no slices of their own.

    Args:
        path: the file to write at the end of the fit.
        num_clocks: the number of clocks to record, at most 10,000.

    Raises:
        UsageError: if an argument is out of range, or if there is no folder for the file.
    """

    def __init__(self, path: str | Path, num_clocks: int = 256) -> None:
        check_path("path", path)
        check_number("num_clocks", num_clocks, at_least=1, at_most=10_000, whole=True)
        self.path = Path(path)
        self.num_clocks = num_clocks
        if not self.path.parent.is_dir():
            raise UsageError(f"path={path} cannot be written: there is no folder {self.path.parent}")

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if stage == "fit":
            self._strategy = attach(self, trainer)
            self._spans: list[tuple[Literal["F", "B", "U"], int, int, int, int]] = []
            self._clocks = 0
            self._last = 0

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        self._last = time.time_ns()

    @override
    def on_forward(self, event: Event) -> None:
        self._note("F", event)

    @override
    def on_backward(self, event: Event) -> None:
        self._note("B", event)

    @override
    def on_update(self, event: Event) -> None:
        self._note("U", event)

    @override
    def on_clock(self, clock: int, operations: Sequence[Operation]) -> None:
        self._clocks += 1
        self._last = time.time_ns()

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        spans = sorted((span for part in self._strategy.gather(self._spans) for span in part), key=lambda span: span[3])
        if spans and trainer.is_global_zero:
            first = spans[0][3]
            seconds = [
                Span(kind, stage, microbatch, 1e-9 * (start - first), 1e-9 * (end - first))
                for kind, stage, microbatch, start, end in spans
            ]
            events = trace_events({"run": Timeline(self._strategy.schedule.num_stages, seconds, ())})
            write_trace(self.path, events)

    def _note(self, kind: Literal["F", "B", "U"], event: Event) -> None:
        """Record an operation that has just ended."""
        start, self._last = self._last, time.time_ns()
        if self._clocks < self.num_clocks and start < self._last:
            self._spans.append((kind, event.stage.index, event.microbatch, start, self._last))
