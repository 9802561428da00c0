"""Lightning callbacks that watch or disturb the pipeline."""

from aimc_pl.callbacks.clock import ClockMonitor

__all__ = ["ClockMonitor"]
