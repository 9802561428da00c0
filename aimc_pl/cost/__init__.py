"""This package models what training costs on hardware: time, energy and memory of every stage and schedule."""

from aimc_pl.cost.constants import ISAAC_2016, MARINELLA_2018, PRESETS, RASCH_2024, Hardware, Quantity, spread
from aimc_pl.cost.estimate import Estimate, estimate
from aimc_pl.cost.hardware_files import find_hardware
from aimc_pl.cost.learning import Learning
from aimc_pl.cost.simulation import Span, StageTimes, Timeline, simulate
from aimc_pl.cost.stages import Cost, StageCost, stage_cost
from aimc_pl.cost.work import Matrix, Work, count_work

__all__ = [
    "ISAAC_2016",
    "MARINELLA_2018",
    "PRESETS",
    "RASCH_2024",
    "Cost",
    "Estimate",
    "Hardware",
    "Learning",
    "Matrix",
    "Quantity",
    "Span",
    "StageCost",
    "StageTimes",
    "Timeline",
    "Work",
    "count_work",
    "estimate",
    "find_hardware",
    "simulate",
    "spread",
    "stage_cost",
]
