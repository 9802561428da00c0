"""Lightning strategies: ``AnalogPipelineStrategy``, also by the names ``aimc_none``, ``aimc_sync``, ``aimc_async``."""

from lightning.pytorch.strategies import StrategyRegistry

from aimc_pl.strategies.analog_pipeline import AnalogPipelineStrategy

AnalogPipelineStrategy.register_strategies(StrategyRegistry)

__all__ = ["AnalogPipelineStrategy"]
