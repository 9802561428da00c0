"""How a callback comes to observe the pipeline."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from aimc_pl.errors import UsageError
from aimc_pl.pipeline import Observer
from aimc_pl.strategies import AnalogPipelineStrategy


def get_strategy(callback: object, trainer: "pl.Trainer") -> AnalogPipelineStrategy:
    """The trainer's strategy.

    Raises:
        UsageError: if it runs no pipeline.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, AnalogPipelineStrategy):
        raise UsageError(
            f"{type(callback).__name__} is about a pipeline, and the strategy is {type(strategy).__name__}: "
            "set Trainer(strategy=AnalogPipelineStrategy(...))"
        )
    return strategy


def attach(observer: Observer, trainer: "pl.Trainer") -> AnalogPipelineStrategy:
    """Let the observer hear of every operation of the trainer's pipeline, and return the strategy.

    Raises:
        UsageError: if the strategy runs no pipeline.
    """
    strategy = get_strategy(observer, trainer)
    if observer not in strategy.observers:
        strategy.observers.append(observer)
    return strategy


def merged(parts: Sequence[Mapping[Any, Any]]) -> dict[Any, Any]:
    """What processes know of their own stages, as one."""
    return {key: value for part in parts for key, value in part.items()}


def gathered(callback: object, value: Any) -> list[Any]:
    """The values of all processes, of a callback that may not have been attached yet."""
    strategy: AnalogPipelineStrategy | None = getattr(callback, "_strategy", None)
    return [value] if strategy is None else strategy.gather(value)
