"""Functions that connect a callback with the pipeline of its trainer."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from aimc_pl.errors import UsageError
from aimc_pl.pipeline import Observer
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.strategies.checks import OTHER_PACKAGE


def get_strategy(callback: object, trainer: "pl.Trainer") -> AnalogPipelineStrategy:
    """Return the strategy of the trainer.

    Raises:
        UsageError: if the strategy does not run a pipeline, or if the trainer is of another package.
    """
    strategy = trainer.strategy
    if type(trainer).__module__.startswith("pytorch_lightning"):
        raise UsageError(OTHER_PACKAGE)
    if not isinstance(strategy, AnalogPipelineStrategy):
        raise UsageError(
            f"{type(callback).__name__} needs a pipeline, but the strategy is {type(strategy).__name__}: "
            "set Trainer(strategy=AnalogPipelineStrategy(...))"
        )
    return strategy


def attach(observer: Observer, trainer: "pl.Trainer") -> AnalogPipelineStrategy:
    """Register the observer with the trainer's pipeline, whose operations it then observes, and return the strategy.

    Raises:
        UsageError: if the strategy does not run a pipeline, or if the trainer is of another package.
    """
    strategy = get_strategy(observer, trainer)
    if observer not in strategy.observers:
        strategy.observers.append(observer)
    return strategy


def merged(parts: Sequence[Mapping[Any, Any]]) -> dict[Any, Any]:
    """Merge the dictionaries of all processes, each of which holds the values of its own stages."""
    return {key: value for part in parts for key, value in part.items()}


def gathered(callback: object, value: Any) -> list[Any]:
    """Return the values of all processes, or only this one's if the callback is not attached to a strategy yet."""
    strategy: AnalogPipelineStrategy | None = getattr(callback, "_strategy", None)
    return [value] if strategy is None else strategy.gather(value)
