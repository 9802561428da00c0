"""This module gathers what training_step logs for every micro-batch, and logs it once per mini-batch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric

from aimc_pl.ghosts import Unknown, delivered
from aimc_pl.patches import patched
from aimc_pl.strategies.private_torchmetrics import last_value, set_last_value
from aimc_pl.strategies.training_step import TrainingStep

_LOG = signature(pl.LightningModule.log)


class Logbook:
    """The values that micro-batches have passed to ``self.log``, until they are logged for the whole mini-batch.

    Means are weighted by the samples of each micro-batch, or by the ``batch_size`` that was given. A value that is a
    mean over samples thus becomes the mean over the whole mini-batch. A ``reduce_fx`` of ``"sum"``, ``"min"``,
    ``"max"`` or a callable is applied over the micro-batches, as Lightning applies it over the steps. A name that a
    step logs several times is logged as often.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, int], tuple[list[Any], list[int], Any, dict[str, Any]]] = {}

    def record(self, step: TrainingStep, name: str, value: Any, **kwargs: Any) -> None:
        """Record one call ``self.log(name, value, **kwargs)`` of a micro-batch.

        Raises:
            UsageError: if the value is a number that only the process of another stage knows.
        """
        if isinstance(value, Unknown):
            raise value.error
        key = name, step.num_logged[name]
        step.num_logged[name] += 1
        values, sizes, _, _ = self._entries.get(key, ([], [], None, {}))
        values.append(last_value(value) if isinstance(value, Metric) else value)
        size = kwargs.pop("batch_size", None)
        sizes.append(step.size if size is None else size)
        self._entries[key] = values, sizes, value, kwargs

    def write(self, log: Callable[..., None]) -> None:
        """Log every gathered name once through ``log``, and empty the logbook."""
        for (name, _), (values, sizes, last, kwargs) in self._entries.items():
            if isinstance(last, Metric):
                # The metric's state covers all micro-batches already. Only its value for the step is averaged.
                if values[-1] is not None:
                    set_last_value(last, _reduce(values, sizes, "mean"))
                value = last
            else:
                value = _reduce(values, sizes, kwargs.get("reduce_fx", "mean"))
            log(name, value, batch_size=sum(sizes), **kwargs)
        self._entries = {}


def _reduce(values: list[Any], sizes: list[int], reduce_fx: str | Callable[[Tensor], Tensor]) -> Tensor:
    stacked = torch.stack([torch.as_tensor(value).detach() for value in values])
    if reduce_fx in ("mean", "avg", torch.mean):
        # Without samples, which a batch_size of 0 claims, all micro-batches count alike.
        weights = torch.tensor(sizes if any(sizes) else [1] * len(sizes), device=stacked.device, dtype=torch.float64)
        return torch.tensordot(weights / weights.sum(), stacked.double(), 1).to(
            stacked.dtype if stacked.is_floating_point() else torch.get_default_dtype()
        )
    reduction = {"sum": torch.sum, "min": torch.min, "max": torch.max}.get(reduce_fx, reduce_fx)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return reduction(stacked)


@contextmanager
def logging_to(module: "pl.LightningModule", record: Callable[..., None]) -> Iterator[None]:
    """Context manager in which ``record`` takes what training_step logs.

    ``record`` is called with the running step, and with the arguments of ``log`` by name. What is logged outside of
    training_step goes to Lightning.
    """
    log = module.log

    def log_in_step(*args: Any, **kwargs: Any) -> None:
        step = TrainingStep.current()
        if step is None:
            log(*args, **kwargs)
        else:
            record(step, **_named(module, args, kwargs))

    with patched((module, "log", log_in_step)):
        yield


@contextmanager
def logging_after(module: "pl.LightningModule") -> Iterator[None]:
    """Context manager that collects what a step in stages logs, and logs it when the step has ended.

    What Lightning computes to log a value is thus no part of the step.
    """
    log, logged = module.log, []
    with patched((module, "log", lambda *args, **kwargs: logged.append(_named(module, args, kwargs)))):
        yield
    for arguments in logged:
        log(**arguments)


def _named(module: "pl.LightningModule", args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``log`` by name, their tensors made known to the last stage, which logs them."""
    arguments = _LOG.bind(module, *args, **kwargs).arguments
    return {name: delivered(value) for name, value in arguments.items() if name != "self"}


def discard(*args: Any, **kwargs: Any) -> None:
    """Log nothing. This function takes the place of ``log``."""
