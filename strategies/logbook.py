"""What a training_step logs micro-batch by micro-batch, logged once per mini-batch."""

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
    """Gathers the values of ``self.log`` over micro-batches.

    Means are weighted by the samples of each micro-batch (or by the ``batch_size`` that was given), so that a value
    which is a mean over samples becomes that of the whole mini-batch; ``reduce_fx`` of ``"sum"``, ``"min"``, ``"max"``
    or a callable is applied over the micro-batches as Lightning applies it over the steps. A name that a step logs
    several times is logged as often.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, int], tuple[list[Any], list[int], Any, dict[str, Any]]] = {}

    def record(self, step: TrainingStep, name: str, value: Any, **kwargs: Any) -> None:
        """Take one ``self.log(name, value, **kwargs)`` of a micro-batch.

        Raises:
            UsageError: for a number that only the process of another stage knows.
        """
        if isinstance(value, Unknown):
            raise value.error
        key = name, step.num_logged[name]
        step.num_logged[name] += 1
        values, sizes, _, _ = self._entries.get(key, ([], [], None, {}))
        values.append(last_value(value) if isinstance(value, Metric) else value)
        sizes.append(kwargs.pop("batch_size", None) or step.size)
        self._entries[key] = values, sizes, value, kwargs

    def write(self, log: Callable[..., None]) -> None:
        """Log every gathered name once through ``log``, and forget it."""
        for (name, _), (values, sizes, last, kwargs) in self._entries.items():
            if isinstance(last, Metric):
                # its state holds all micro-batches; only the value of the step is to be gathered
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
        weights = torch.tensor(sizes, device=stacked.device, dtype=torch.float64)
        return torch.tensordot(weights / weights.sum(), stacked.double(), 1).to(
            stacked.dtype if stacked.is_floating_point() else torch.get_default_dtype()
        )
    reduction = {"sum": torch.sum, "min": torch.min, "max": torch.max}.get(reduce_fx, reduce_fx)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return reduction(stacked)


@contextmanager
def logging_to(module: "pl.LightningModule", record: Callable[..., None]) -> Iterator[None]:
    """Hand what training_step logs to ``record``: the step, and the arguments of ``log`` by name."""
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
    """Log what a step in stages logs when it has ended: what Lightning computes to log is no part of the step."""
    log, logged = module.log, []
    with patched((module, "log", lambda *args, **kwargs: logged.append(_named(module, args, kwargs)))):
        yield
    for arguments in logged:
        log(**arguments)


def _named(module: "pl.LightningModule", args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``log`` by name, with a value that is known in the last stage."""
    arguments = _LOG.bind(module, *args, **kwargs).arguments
    return {name: delivered(value) for name, value in arguments.items() if name != "self"}


def discard(*args: Any, **kwargs: Any) -> None:
    """Log nothing."""
