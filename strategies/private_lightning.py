"""This module holds every use of a private name of Lightning. A test for each name notices if Lightning removes it."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, override

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher, subprocess_script
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from aimc_pl.patches import Patch, patched

SET_AROUND_STEPS = ("log", "_current_fx_name")
"""Attributes of a LightningModule that change while a training step waits.

They are ``log``, which this package replaces, and the name of the hook that runs.
"""

_BEFORE_STEP = ("on_after_backward", "on_before_optimizer_step")
_PREPARING = (*_BEFORE_STEP, "configure_gradient_clipping", "clip_gradients")


class ScriptLauncher(_SubprocessScriptLauncher):
    """A launcher that starts the user's script once more for every further process."""

    def start_children(self) -> None:
        """Start the further processes. The attribute ``procs`` then holds them."""
        # Lightning would take the "-c" of "python -c PROGRAM" for the name of a script.
        command = [sys.executable, *sys.orig_argv[1:]]
        own = [(subprocess_script, "_basic_subprocess_cmd", lambda: command)] if sys.argv[0] == "-c" else []
        with patched(*own):
            self._call_children_scripts()


def random_states() -> dict[str, Any]:
    """Return the random states of torch on the CPU, of numpy and of Python."""
    return _collect_rng_states(include_cuda=False)


def set_random_states(states: dict[str, Any]) -> None:
    """Restore the random states that :func:`random_states` has returned."""
    _set_rng_states(states)


def is_step_hooked(trainer: "pl.Trainer") -> bool:
    """Return whether :func:`prepare_step` does anything: whether there are hooks, or gradients are clipped."""
    module, precision = trainer.lightning_module, type(trainer.precision_plugin)
    callbacks = callbacks_of(trainer)
    return (
        trainer.gradient_clip_val is not None
        or precision.post_backward is not Precision.post_backward
        or precision._after_closure is not Precision._after_closure
        or any(is_overridden(hook, callback) for callback in callbacks for hook in _BEFORE_STEP)
        or any(is_overridden(hook, module) for hook in _PREPARING)
    )


def prepare_step(trainer: "pl.Trainer", optimizer: Optimizer) -> None:
    """Run what Lightning runs between a backward and the optimizer's step: its hooks, and gradient clipping."""
    module, precision = trainer.lightning_module, trainer.precision_plugin
    precision.post_backward(torch.zeros((), device=module.device), module)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(parameter.grad is not None for parameter in parameters):
        precision._after_closure(module, optimizer)
    else:
        # The stage is frozen, or all analog. torch's clipping by value fails if there is no gradient at all.
        with patched((precision, "clip_grad_by_value", lambda *args, **kwargs: None)):
            precision._after_closure(module, optimizer)


def hooks_before_step_inside(
    precision: Precision, context: Callable[[], AbstractContextManager[Any]]
) -> AbstractContextManager[None]:
    """Return a context manager in which Lightning runs its hooks and clipping before a step inside ``context()``."""
    after_closure = precision._after_closure

    def inside(*args: Any) -> None:
        with context():
            after_closure(*args)

    return patched((precision, "_after_closure", inside))


def last_batch_before_look(trainer: "pl.Trainer") -> bool:
    """Return whether validation, the end of the epoch or the end of the fit follows this mini-batch."""
    epoch, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return (
        epoch.batch_progress.is_last_batch
        or trainer.global_step + 1 == trainer.max_steps
        or epoch._should_check_val_fx(fetcher)
    )


def share_threads(num_processes: int) -> None:
    """Divide the processors of this machine among its processes, unless OMP_NUM_THREADS is set."""
    _set_num_threads_if_needed(num_processes)


def batch_name(trainer: "pl.Trainer") -> str:
    """Return how messages name the batch that a trainer is at."""
    stage = trainer.state.stage
    if trainer.training:
        return f"batch {trainer.fit_loop.batch_idx} of epoch {trainer.current_epoch}"
    loop: Any = trainer._active_loop
    return f"batch {loop.batch_progress.current.ready - 1} of {stage.value if stage else 'a run'}"


def logging_in(module: "pl.LightningModule", hook: str) -> AbstractContextManager[None]:
    """Return a context manager in which values are logged as if ``hook`` was running."""
    return patched((module, "_current_fx_name", hook))


def without_loggers(trainer: "pl.Trainer") -> AbstractContextManager[None]:
    """Return a context manager in which the trainer's loggers discard what they are given."""
    return patched((trainer, "_loggers", [DummyLogger() for _ in trainer.loggers]))


class CheckpointReadingCLI(LightningCLI):
    """Lightning's command line, which enters a context to read from the checkpoint that ``ckpt_path`` names."""

    def reading_checkpoint(self, path: str) -> AbstractContextManager[Any]:
        """Return a context manager that is entered while hyperparameters are read from a checkpoint.

        Args:
            path: the checkpoint; empty if there is none.
        """
        return nullcontext()

    @override
    def _parse_ckpt_path(self) -> None:
        if getattr(self.config, "subcommand", None) is None:
            return
        with self.reading_checkpoint(self.config[self.config.subcommand].get("ckpt_path") or ""):
            super()._parse_ckpt_path()


def evaluate_without_inference_mode(trainer: "pl.Trainer") -> None:
    """Make evaluation switch off gradients only, without inference mode.

    Tensors of inference mode do not count their changes in place.
    """
    for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False


def should_log(trainer: "pl.Trainer") -> bool:
    """Return whether values are logged with this training step."""
    return trainer._logger_connector.should_update_logs


def epoch_metrics(trainer: "pl.Trainer") -> dict[str, Any]:
    """Return the metrics that the running loop alone has logged in this epoch, as callbacks see them."""
    return {} if trainer._results is None else trainer._results.metrics(on_step=False)["callback"]


def update_callback_metrics(trainer: "pl.Trainer", metrics: dict[str, Tensor]) -> None:
    """Add metrics to those that callbacks see."""
    trainer._logger_connector._callback_metrics.update(metrics)


def callbacks_of(trainer: "pl.Trainer") -> list[Any]:
    """Return the callbacks of a trainer."""
    # Lightning adds the attribute outside of the class.
    return trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]


def forget_logged(trainer: "pl.Trainer") -> None:
    """Forget what the running loop has logged in this process in this epoch."""
    if trainer._results is not None:
        trainer._results.clear()


def share_before_plateaus(trainer: "pl.Trainer", share: Callable[["pl.Trainer"], None]) -> Patch:
    """Return the patch that calls ``share(trainer)`` before a plateau scheduler reads its metric."""
    loop = trainer.fit_loop.epoch_loop
    read = loop._get_monitor_value

    def value(key: str) -> Any:
        share(trainer)
        return read(key)

    return loop, "_get_monitor_value", value


def may_save_now(trainer: "pl.Trainer", step: int) -> bool:
    """Return whether a checkpoint may be due at a global step, whose name or place may depend on metrics."""
    savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return any(
        c._train_time_interval is not None or (c._every_n_train_steps and step % c._every_n_train_steps == 0)
        for c in savers
    )


def train_loader(trainer: "pl.Trainer") -> Any:
    """Return the CombinedLoader of a fit, which is iterated once per epoch."""
    return trainer.fit_loop._combined_loader


def train_fetcher(trainer: "pl.Trainer") -> Any:
    """Return the object that fetches batches from the CombinedLoader, and counts them in ``fetched``."""
    return trainer.fit_loop._data_fetcher


def set_epoch(trainer: "pl.Trainer") -> None:
    """Tell the samplers the number of the current epoch."""
    for loader in train_loader(trainer).flattened:
        _set_sampler_epoch(loader, trainer.current_epoch)


def make_iterator_in_epoch(trainer: "pl.Trainer") -> None:
    """Make the first epoch of a resumed fit create its iterator, as later epochs do, and not use the existing one."""
    trainer.fit_loop._resuming_from_checkpoint = False
