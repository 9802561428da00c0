"""What we need of Lightning that has no public name, each with a test that notices when it goes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from torch.optim import Optimizer

from aimc_pl.strategies.logbook import replaced


def prepare_step(trainer: "pl.Trainer", optimizer: Optimizer) -> None:
    """What Lightning does between a backward and the optimizer's step: its hooks, and the clipping."""
    module, precision = trainer.lightning_module, trainer.precision_plugin
    precision.post_backward(torch.zeros((), device=module.device), module)
    precision._after_closure(module, optimizer)


def hooks_before_step_inside(
    precision: Precision, context: Callable[[], AbstractContextManager[Any]]
) -> AbstractContextManager[None]:
    """While it is open, Lightning's hooks and clipping before an optimizer's step run inside a context."""
    after_closure = precision._after_closure

    def inside(*args: Any) -> None:
        with context():
            after_closure(*args)

    return replaced(precision, "_after_closure", inside)


def last_batch_before_look(trainer: "pl.Trainer") -> bool:
    """Whether validation, the end of the epoch or the end of the fit follows this mini-batch."""
    epoch, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return (
        epoch.batch_progress.is_last_batch
        or trainer.global_step + 1 == trainer.max_steps
        or epoch._should_check_val_fx(fetcher)
    )


@contextmanager
def logging_in(module: "pl.LightningModule", hook: str) -> Iterator[None]:
    """Log as if ``hook`` ran."""
    before, module._current_fx_name = module._current_fx_name, hook
    try:
        yield
    finally:
        module._current_fx_name = before


@contextmanager
def without_loggers(trainer: "pl.Trainer") -> Iterator[None]:
    """Discard what is given to the trainer's loggers."""
    loggers = trainer.loggers
    silent: list[Logger] = [DummyLogger() for _ in loggers]
    trainer.loggers = silent
    try:
        yield
    finally:
        trainer.loggers = loggers


def evaluate_without_inference_mode(trainer: "pl.Trainer") -> None:
    """Let evaluation only switch gradients off: tensors of inference mode do not tell when they change in place."""
    for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False


def update_callback_metrics(trainer: "pl.Trainer", metrics: dict[str, Tensor]) -> None:
    """Add to what callbacks see of the metrics."""
    trainer._logger_connector._callback_metrics.update(metrics)


def saves_by_metric(trainer: "pl.Trainer", step: int) -> bool:
    """Whether a checkpoint that a metric decides about is due at a global step."""
    savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return any(c.monitor and c._every_n_train_steps and step % c._every_n_train_steps == 0 for c in savers)
