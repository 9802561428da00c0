"""This module makes a device of measured conductances."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from aihwkit.simulator.configs.devices import PiecewiseStepDevice
from numpy.typing import NDArray

from aimc_pl.arguments import check_number, check_path, shown
from aimc_pl.devices.catalogue import AnalogDevice, Backend, described, on_crossbar, pulsed
from aimc_pl.errors import UsageError

SAMPLE = Path(__file__).with_name("sample_conductances.csv")
"""A sample of the measurements that :func:`piecewise_step` reads: 100 pulses each way on a simulated device."""

_NODES = 11
"""The number of weights, from bound to bound, between which measured steps are interpolated."""


@described
def piecewise_step(
    measurements: str | Path | None = None,
    w_max: float = 1.0,
    cycle_to_cycle: float | None = None,
    device_to_device: float = 0.0,
    perfect_io: bool = False,
    backend: Backend = "mean_field",
) -> AnalogDevice:
    """Pulsed device whose steps are those of your own device, from a CSV file of measured conductances.

    The file has the columns ``up`` and ``down``: the conductance before the first pulse and after each pulse of a train
    of pulses up, and the same for a train of pulses down, in any unit. One train may be longer, and a row of empty
    cells separates repeated measurements. The lowest and the highest conductance become the weights −w_max and w_max.
    The steps are fitted by least squares at 11 weights, and interpolated between them.

    Args:
        measurements: the CSV file; by default a simulated sample, which shows the format.
        w_max: the weight's range is [−w_max, w_max].
        cycle_to_cycle: standard deviation of a step, relative to the step; by default that of the measured steps.
        device_to_device: relative standard deviation of the steps and of the bounds over the cross-points.
        perfect_io: whether forward and backward products are exact, without converters and noise.
        backend: how the device is simulated: ``mean_field``, ``bits`` (pulse trains are drawn) or ``aihwkit``.

    Raises:
        UsageError: if the file cannot be read, has other columns, or shows no steps.
    """
    check_number("w_max", w_max, above=0, at_most=10**9)
    up, down, measured = _fit(SAMPLE if measurements is None else measurements)
    spread = measured if cycle_to_cycle is None else cycle_to_cycle
    mean = float(np.mean([up, down]))
    fields: dict[str, Any] = pulsed("w_max", w_max, 2, spread, device_to_device) | {"dw_min": 2 * w_max * mean}
    device = PiecewiseStepDevice(**fields, piecewise_up=(up / mean).tolist(), piecewise_down=(down / mean).tolist())
    return on_crossbar(device, perfect_io, backend)


def _fit(path: str | Path) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Return the steps up and down at every node, in units of the range, and the relative spread of the steps."""
    up, down = _read(path)
    conductances = np.concatenate([up, down])
    if np.isfinite(conductances).sum() == 0 or np.nanmin(conductances) == np.nanmax(conductances):
        raise UsageError(
            f"{shown(str(path))} shows no steps: up and down need conductances that change with the pulses"
        )
    lowest, highest = np.nanmin(conductances), np.nanmax(conductances)
    (ups, up_error, up_power), (downs, down_error, down_power) = (
        _fit_steps((train - lowest) / (highest - lowest), sign) for train, sign in ((up, 1), (down, -1))
    )
    if np.mean([ups, downs]) <= 0:
        raise UsageError(f"{shown(str(path))} shows no steps: up must rise with the pulses, and down must fall")
    return ups, downs, float(np.sqrt((up_error + down_error) / (up_power + down_power)))


def _read(path: str | Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    check_path("measurements", path)
    try:
        with warnings.catch_warnings(action="ignore"):  # numpy also warns of what it raises
            table = np.genfromtxt(path, delimiter=",", names=True, encoding="utf-8-sig")
    except (OSError, ValueError, IndexError) as error:
        raise UsageError(f"measurements {shown(str(path))} cannot be read: {str(error).splitlines()[0]}") from error
    names = table.dtype.names or ()
    if not {"up", "down"} <= {*names}:
        raise UsageError(f"{shown(str(path))} needs the columns 'up' and 'down', and has {', '.join(names) or 'none'}")
    return np.atleast_1d(table["up"]), np.atleast_1d(table["down"])


def _fit_steps(positions: NDArray[np.float64], sign: int) -> tuple[NDArray[np.float64], float, float]:
    """Fit steps that are interpolated between nodes. Return them, the squared error, and the sum of squared steps."""
    steps = sign * np.diff(positions)
    known = np.isfinite(steps)
    # Every step is a mean of the steps at the two nodes around the position where it begins.
    shares = np.clip(1 - np.abs(positions[:-1][known, None] * (_NODES - 1) - np.arange(_NODES)), 0, 1)
    seen = shares.sum(0) > 0
    found = np.linalg.lstsq(shares[:, seen], steps[known], rcond=None)[0]
    nodes = np.interp(np.arange(_NODES), np.flatnonzero(seen), found).clip(min=0)
    fitted = shares @ nodes
    freedom = max(len(fitted) - seen.sum(), 1) / max(len(fitted), 1)
    return nodes, float(((steps[known] - fitted) ** 2).sum() / freedom), float((fitted**2).sum())
