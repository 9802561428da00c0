"""This package holds the Lightning strategy ``AnalogPipelineStrategy``.

Importing the package registers the names ``aimc_none``, ``aimc_sync`` and ``aimc_async`` for ``Trainer(strategy=...)``.
"""

from lightning.pytorch.strategies import StrategyRegistry

from aimc_pl.strategies.analog_pipeline import AnalogPipelineStrategy

AnalogPipelineStrategy.register_strategies(StrategyRegistry)

__all__ = ["AnalogPipelineStrategy"]
