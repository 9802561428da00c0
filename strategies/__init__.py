"""This package holds the Lightning strategy ``AnalogPipelineStrategy``, and loads its checkpoints without a Trainer.

Importing the package registers a name for every schedule, ``aimc_async`` for example, for ``Trainer(strategy=...)``. A
strategy of such a name has the default arguments, so it makes no layer analog.
"""

from lightning.pytorch.strategies import StrategyRegistry

from aimc_pl.strategies.analog_pipeline import AnalogPipelineStrategy
from aimc_pl.strategies.loading import load_checkpoint, load_from_checkpoint
from aimc_pl.strategies.remedies import Accumulation, Remedy, StageLearningRate, SyncStart

AnalogPipelineStrategy.register_strategies(StrategyRegistry)

__all__ = [
    "Accumulation",
    "AnalogPipelineStrategy",
    "Remedy",
    "StageLearningRate",
    "SyncStart",
    "load_checkpoint",
    "load_from_checkpoint",
]
