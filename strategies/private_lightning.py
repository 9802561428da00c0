"""What we need of Lightning that has no public name, each with a test that notices when it goes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from torch import Tensor
from torch.optim import Optimizer


def prepare_step(trainer: "pl.Trainer", optimizer: Optimizer) -> None:
    """What Lightning does between a backward and the optimizer's step: its hooks, and the clipping."""
    module, precision = trainer.lightning_module, trainer.precision_plugin
    precision.post_backward(torch.zeros((), device=module.device), module)
    precision._after_closure(module, optimizer)


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


def train_loader(trainer: "pl.Trainer") -> Any:
    """The CombinedLoader of a fit, which is iterated once per epoch."""
    return trainer.fit_loop._combined_loader


def train_fetcher(trainer: "pl.Trainer") -> Any:
    """What fetches batches from the CombinedLoader, and counts them in ``fetched``."""
    return trainer.fit_loop._data_fetcher


def set_epoch(trainer: "pl.Trainer") -> None:
    """Tell the samplers the number of the epoch that is going on."""
    for loader in train_loader(trainer).flattened:
        _set_sampler_epoch(loader, trainer.current_epoch)


def make_iterator_in_epoch(trainer: "pl.Trainer") -> None:
    """Let the first epoch of a resumed fit make its iterator where later ones do, and not take the one there is."""
    trainer.fit_loop._resuming_from_checkpoint = False
