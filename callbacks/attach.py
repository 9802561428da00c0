"""How a callback comes to observe the pipeline."""

import lightning.pytorch as pl

from aimc_pl.errors import UsageError
from aimc_pl.pipeline import Observer
from aimc_pl.strategies import AnalogPipelineStrategy


def attach(observer: Observer, trainer: "pl.Trainer") -> AnalogPipelineStrategy:
    """Let the observer hear of every operation of the trainer's pipeline, and return the strategy.

    Raises:
        UsageError: if the trainer runs another strategy.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, AnalogPipelineStrategy):
        raise UsageError(
            f"{type(observer).__name__} observes a pipeline, and the strategy is {type(strategy).__name__}: "
            "set Trainer(strategy=AnalogPipelineStrategy(...))"
        )
    if observer not in strategy.observers:
        strategy.observers.append(observer)
    return strategy
