"""This module evaluates trained weights on devices for inference, whose conductances are programmed once and drift.

The weights of analog training live on the devices that trained them. Here they are programmed into other devices, such
as phase-change memory, with a model of aihwkit for noise and drift.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from aihwkit.inference import PCMLikeNoiseModel
from aihwkit.simulator.configs import InferenceRPUConfig, TorchInferenceRPUConfig
from aihwkit.simulator.parameters.mapping import MappingParameter
from matplotlib.figure import Figure
from torch import nn

from aimc_pl.analog import analog_layers, is_analog
from aimc_pl.arguments import check_callable, check_instance, check_list, check_number, check_seed, shown
from aimc_pl.devices import convert_to_analog
from aimc_pl.errors import UsageError
from aimc_pl.export import to_digital
from aimc_pl.figures import BLUE, LAYERS, ORANGE, styled
from aimc_pl.patches import patched

_ROW = {"compensated", "time", "mean", "std"}

SECOND, HOUR, DAY, YEAR = 1.0, 3600.0, 86_400.0, 31_536_000.0


def phase_change_memory(g_max: float = 25.0) -> InferenceRPUConfig:
    """Return the configuration of phase-change memory: aihwkit's ``PCMLikeNoiseModel``, fitted to measured devices.

    The largest weight of each output is programmed to the largest conductance. Products pass aihwkit's default
    converters. Drift is compensated by one factor per tile. The tiles compute in torch, so that results repeat by seed.

    Args:
        g_max: the largest conductance in microsiemens.

    Raises:
        UsageError: if the conductance is not above 0.
    """
    check_number("g_max", g_max, above=0)
    return TorchInferenceRPUConfig(
        mapping=MappingParameter(weight_scaling_omega=1.0, weight_scaling_columnwise=True),
        noise_model=PCMLikeNoiseModel(g_max=g_max),
    )


def evaluate_drift(
    module: nn.Module,
    metric: Callable[[Any], float],
    times: Sequence[float] = (SECOND, HOUR, DAY, YEAR),
    rpu_config: InferenceRPUConfig | None = None,
    repeats: int = 10,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Evaluate a module after its weights have been programmed into devices for inference and have drifted.

    The layers that are analog in the module are programmed, with the weights with which they compute. If no layer is
    analog, all Linear and Conv layers are. Each repeat programs them anew. Its devices then age: they keep their drift
    exponents from one time to the next, and are read with new noise. With a compensation of drift in the configuration,
    the same devices are also evaluated without it.

    Args:
        module: the trained module. It is not changed.
        metric: returns a number for a copy of the module, in evaluation mode. It may run ``Trainer().test``.
        times: seconds from the programming to the evaluation. At 0 there is the noise of programming and reading only.
        rpu_config: the devices, :func:`phase_change_memory` by default.
        repeats: how often the weights are programmed.
        seed: seeds the noise of repeat r with ``seed + r``. The global random state of torch is left as it is.

    Returns:
        A row for each time and compensation, with ``compensated``, ``time``, ``mean`` and ``std`` of the metric over
        the repeats (NaN for one repeat), and ``repeats``.

    Raises:
        UsageError: if an argument is out of range, if the module has no layer to program, or if ``metric`` returns no
            number.
    """
    check_instance("module", module, nn.Module, "a torch.nn.Module")
    check_callable("metric", metric)
    check_list("times", times, (int, float), "seconds")
    if not times:
        raise UsageError("times is empty: give at least one time in seconds")
    for time in times:
        check_number("each of times", time, at_least=0)
    check_number("repeats", repeats, at_least=1, whole=True)
    check_seed("seed", seed)
    config = phase_change_memory() if rpu_config is None else rpu_config
    check_instance("rpu_config", config, InferenceRPUConfig, "an InferenceRPUConfig of aihwkit")
    ages = sorted({float(time) for time in times})
    compensations = [False] if config.drift_compensation is None else [False, True]
    values = np.empty((repeats, len(ages), len(compensations)))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        programmed = _converted(module, config)
        tiles = [tile for layer in analog_layers(programmed) for tile in layer.analog_tiles()]
        for repeat in range(repeats):
            torch.manual_seed(seed + repeat)
            for tile in tiles:
                tile.program_weights()
            for age, time in enumerate(ages):
                for tile in tiles:
                    tile.drift_weights(time)
                for index, compensated in enumerate(compensations):
                    values[repeat, age, index] = _evaluate(programmed.eval(), metric, tiles, compensated)
    return [
        {
            "compensated": compensated,
            "time": time,
            "mean": float(values[:, age, index].mean()),
            "std": float(values[:, age, index].std(ddof=1)) if repeats > 1 else float("nan"),
            "repeats": repeats,
        }
        for index, compensated in enumerate(compensations)
        for age, time in enumerate(ages)
    ]


@styled
def draw_drift(rows: Sequence[dict[str, Any]], name: str = "metric", digital: float | None = None) -> Figure:
    """Return a figure of the rows of :func:`evaluate_drift`: mean and standard deviation against time.

    Args:
        rows: the rows.
        name: what the metric is, with its unit.
        digital: the metric of the digital module, drawn as a line.

    Raises:
        UsageError: if there are no such rows.
    """
    check_list("rows", rows, dict, "rows of evaluate_drift")
    if not rows or not all(row.keys() >= _ROW for row in rows):
        raise UsageError(f"rows must be the rows that evaluate_drift returns, got {shown(rows)}")
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for compensated, label, colour in ((True, "compensated", BLUE), (False, "not compensated", ORANGE)):
        if chosen := [row for row in rows if row["compensated"] is compensated]:
            time, mean, std = (np.array([row[key] for row in chosen]) for key in ("time", "mean", "std"))
            axes.errorbar(time, mean, np.nan_to_num(std), marker="o", capsize=3, label=label, color=colour)
    if digital is not None:
        axes.axhline(digital, color=LAYERS["digital"], linestyle=":", label="digital")
    axes.set_xscale("symlog", linthresh=SECOND)
    axes.set_xticks([SECOND, HOUR, DAY, YEAR], ["1 s", "1 h", "1 d", "1 y"])
    axes.minorticks_off()
    times = [row["time"] for row in rows]
    axes.set_xlim(min(times) / 3 if min(times) >= SECOND else -0.3, 3 * max(*times, SECOND))
    axes.set(xlabel="time since programming", ylabel=name)
    axes.legend()
    return figure


def _converted(module: nn.Module, config: InferenceRPUConfig) -> nn.Module:
    names = [name for name, layer in module.named_modules() if is_analog(layer)]
    if "" in names:
        raise UsageError("the module is one analog layer: put it into a torch.nn.Sequential")
    digital = to_digital(module).requires_grad_(True)  # frozen layers would stay digital
    convert_to_analog(digital, dict.fromkeys(names, config) if names else config)
    return digital


def _evaluate(module: nn.Module, metric: Callable[[Any], float], tiles: Sequence[Any], compensated: bool) -> float:
    with ExitStack() as stack:
        if not compensated:
            configs = {id(tile.rpu_config): tile.rpu_config for tile in tiles}
            stack.enter_context(patched(*((config, "drift_compensation", None) for config in configs.values())))
        value = metric(module)
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise UsageError(f"metric must return a number, got {shown(value)}") from error
