"""This package holds Lightning callbacks that observe the pipeline, or inject imperfections of devices into it.

It also has two loggers: one for TensorBoard, and one for a CSV file.
"""

from aimc_pl.callbacks.bar import PipelineBar
from aimc_pl.callbacks.clock import ClockMonitor
from aimc_pl.callbacks.dashboard import Dashboard, PipelineDiagram
from aimc_pl.callbacks.devices import DeviceMonitor
from aimc_pl.callbacks.noise import DeviceNoise
from aimc_pl.callbacks.run_board import RunBoard
from aimc_pl.callbacks.run_table import RunTable
from aimc_pl.callbacks.staleness import StalenessMonitor
from aimc_pl.callbacks.trace import TraceWriter
from aimc_pl.imperfections import DeviceVariation, Drift, ReadNoise, StuckAt, WriteNoise

__all__ = [
    "ClockMonitor",
    "Dashboard",
    "DeviceMonitor",
    "DeviceNoise",
    "DeviceVariation",
    "Drift",
    "PipelineBar",
    "PipelineDiagram",
    "ReadNoise",
    "RunBoard",
    "RunTable",
    "StalenessMonitor",
    "StuckAt",
    "TraceWriter",
    "WriteNoise",
]
