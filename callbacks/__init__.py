"""This package holds Lightning callbacks that observe the pipeline, or inject imperfections of devices into it.

It also has a logger, which writes what a run logs to a CSV file.
"""

from aimc_pl.callbacks.bar import PipelineBar
from aimc_pl.callbacks.clock import ClockMonitor
from aimc_pl.callbacks.dashboard import Dashboard, PipelineDiagram
from aimc_pl.callbacks.noise import DeviceNoise
from aimc_pl.callbacks.run_table import RunTable
from aimc_pl.callbacks.staleness import StalenessMonitor
from aimc_pl.callbacks.trace import TraceWriter
from aimc_pl.imperfections import DeviceVariation, Drift, ReadNoise, StuckAt, WriteNoise

__all__ = [
    "ClockMonitor",
    "Dashboard",
    "DeviceNoise",
    "DeviceVariation",
    "Drift",
    "PipelineBar",
    "PipelineDiagram",
    "ReadNoise",
    "RunTable",
    "StalenessMonitor",
    "StuckAt",
    "TraceWriter",
    "WriteNoise",
]
