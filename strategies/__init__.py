"""This package holds the Lightning strategy ``AnalogPipelineStrategy``.

Importing the package registers the names ``aimc_none``, ``aimc_sync``, ``aimc_1f1b`` and ``aimc_async`` for
``Trainer(strategy=...)``. A strategy of such a name has the default arguments, so it makes no layer analog.
"""

from lightning.pytorch.strategies import StrategyRegistry

from aimc_pl.strategies.analog_pipeline import AnalogPipelineStrategy
from aimc_pl.strategies.remedies import Accumulation, Remedy, StageLearningRate, SyncStart

AnalogPipelineStrategy.register_strategies(StrategyRegistry)

__all__ = ["Accumulation", "AnalogPipelineStrategy", "Remedy", "StageLearningRate", "SyncStart"]
