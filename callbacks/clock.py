"""The callback in this module counts clock cycles, and logs how well they are used."""

from collections.abc import Mapping, Sequence
from typing import Any, override

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from aimc_pl.callbacks.attach import attach
from aimc_pl.cost import find_hardware
from aimc_pl.cost.estimate import Meter
from aimc_pl.cost.states import states_of
from aimc_pl.errors import UsageError
from aimc_pl.pipeline import Event, Observer
from aimc_pl.schedule import Operation
from aimc_pl.stage import StageInfo
from aimc_pl.strategies.private_lightning import epoch_metrics, should_log


class ClockMonitor(Callback, Observer):
    """A callback that counts the clock cycles of the pipeline.

    A clock cycle is the time of one forward or one backward of a micro-batch on an accelerator. Under schedule
    ``"zero_bubble"`` the gradient of the weights from a micro-batch takes another cycle. At the end of every epoch the
    callback logs ``clock/cycles``, ``clock/density`` (the busy fraction of all accelerator-cycles),
    ``clock/samples_per_cycle`` and ``clock/speedup`` (over a run without a pipeline). It also writes every validation
    metric to TensorBoard as ``by_clock/…``, with the clock cycle as the step, and as ``by_epoch/…``, with the epoch.
    At logged steps it writes the training loss as ``by_clock/train_loss``.

    With ``hardware`` it also logs ``clock/seconds`` and ``clock/joules``, which the run would take on this hardware
    (see :mod:`aimc_pl.cost`), and writes the metrics as ``by_time/…`` and ``by_energy/…``, with nanoseconds and
    nanojoules as the step. All micro-batches count as the first one. This needs all stages in one process.

    Args:
        hardware: the name of a preset, or the path of a YAML file, as for ``aimc-pl cost``.

    Attributes:
        cycles: the number of clock cycles so far, including those before a resumed checkpoint.
        operations: the number of operations in the schedule's table so far: forwards, backwards and, under
            ``"zero_bubble"``, gradients of weights. Each keeps one accelerator busy for one cycle.
        samples: the number of training samples so far.
        tags: the tags of what it has written to TensorBoard by itself.

    Raises:
        UsageError: if the hardware is unknown, or if the stages run in several processes.
    """

    def __init__(self, hardware: str | None = None) -> None:
        self.cycles = 0
        self.operations = 0
        self.samples = 0
        self.tags: set[str] = set()
        self.hardware = None if hardware is None else find_hardware(hardware)
        self._before = 0.0, 0.0
        """The seconds and the joules before the pipeline of this fit."""
        self._meter: Meter | None = None

    @property
    def speedup(self) -> float:
        """The factor by which clock cycles are fewer than without a pipeline, where one operation runs at a time."""
        return self.operations / max(self.cycles, 1)

    @property
    def density(self) -> float:
        """The busy fraction of all accelerator-cycles."""
        return self.speedup / self._schedule.num_stages

    @property
    def seconds(self) -> float:
        """The time that the run so far would take on the hardware; 0 without one."""
        return self._before[0] + (self._meter.seconds if self._meter else 0.0)

    @property
    def joules(self) -> float:
        """The energy that the run so far would take on the hardware; 0 without one."""
        return self._before[1] + (self._meter.joules if self._meter else 0.0)

    def report(self) -> str:
        """Return one line about the clock cycles of the run."""
        accelerators = f"{self._schedule.num_stages} accelerator{'s' * (self._schedule.num_stages > 1)}"
        return (
            f"{self.cycles:,} simulated clock cycles on {accelerators} (density {self.density:.2f}), "
            f"speedup {self.speedup:.2f} in clock cycles over no pipeline"
        )

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._strategy = attach(self, trainer)
        self._schedule = self._strategy.schedule
        if self.hardware is not None and self._strategy.is_multiprocess:
            raise UsageError(
                "ClockMonitor(hardware=...) counts the work of the whole network, which no process holds with one "
                "stage in each: set Trainer(devices=1)"
            )

    @override
    def on_start(self, stages: Sequence[StageInfo]) -> None:
        if self.hardware is not None:
            self._before, self._meter = (self.seconds, self.joules), None
            works = self._strategy.count_work(*self._batch, self.hardware)
            self._meter = Meter(works, self._schedule, self.hardware, states_of(self._strategy.optimizers[0]))

    @override
    def on_clock(self, clock: int, operations: Sequence[Operation]) -> None:
        self.cycles += self._schedule.cycles_per_clock
        self.operations += len(operations)
        if self._meter is not None:
            assert self._strategy.pipeline is not None
            self._meter.clock(operations, self._strategy.pipeline.running)

    @override
    def on_update(self, event: Event) -> None:
        if self._meter is not None:
            self._meter.update(event.stage.index, event.since_fill)

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        self.samples += self._strategy.batch_size(batch)
        if self.hardware is not None:
            self._batch = batch, batch_idx

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        values = {
            "clock/cycles": float(self.cycles),
            "clock/density": self.density,
            "clock/samples_per_cycle": self.samples / max(self.cycles, 1),
            "clock/speedup": self.speedup,
        }
        if self.hardware is not None:
            values |= {"clock/seconds": self.seconds, "clock/joules": self.joules}
        pl_module.log_dict(values)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning gives callbacks a dictionary, which is empty if the step had no loss.
        if should_log(trainer) and isinstance(outputs, dict) and isinstance(outputs.get("loss"), Tensor):
            self._write(trainer, {"train_loss": outputs["loss"]}, self._spent())

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._write(trainer, epoch_metrics(trainer), {**self._spent(), "epoch": trainer.current_epoch + 1})

    def _spent(self) -> dict[str, int]:
        """Return what the run has spent so far, as steps for TensorBoard."""
        if self.hardware is None:
            return {"clock": self.cycles}
        return {"clock": self.cycles, "time": round(1e9 * self.seconds), "energy": round(1e9 * self.joules)}

    def _write(self, trainer: "pl.Trainer", values: Mapping[str, Any], spent: Mapping[str, int]) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, value in values.items():
                    for against, step in spent.items():
                        logger.experiment.add_scalar(f"by_{against}/{name}", value, step)
                        self.tags.add(f"by_{against}/{name}")

    @override
    def state_dict(self) -> dict[str, Any]:
        simulated = {} if self.hardware is None else {"_before": (self.seconds, self.joules)}
        return {"cycles": self.cycles, "operations": self.operations, "samples": self.samples, **simulated}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)
