"""This module checks whether the mean-field tile can simulate an aihwkit configuration."""

from collections.abc import Mapping
from typing import Any

from aihwkit.simulator.configs import SingleRPUConfig
from aihwkit.simulator.parameters.enums import AnalogMVType, BoundManagementType, NoiseManagementType, PulseType

from aimc_pl.devices.mean_field.response import SUPPORTED_DEVICES
from aimc_pl.errors import UsageError

_CHOICES: dict[str, tuple[Any, ...]] = {
    "mv_type": (AnalogMVType.ONE_PASS, AnalogMVType.IDEAL),
    "bound_management": (BoundManagementType.NONE, BoundManagementType.ITERATIVE),
    "noise_management": (NoiseManagementType.NONE, NoiseManagementType.ABS_MAX, NoiseManagementType.CONSTANT),
    "pulse_type": (PulseType.STOCHASTIC_COMPRESSED, PulseType.STOCHASTIC),
}
_OFF: dict[str, dict[str, Any]] = {
    "device": {
        "diffusion": 0.0,
        "lifetime": 0.0,
        "dw_min_std_add": 0.0,
        "dw_min_std_slope": 0.0,
        "count_pulses": False,
    },
    "update": {"res": 0, "x_res_implicit": 0, "d_res_implicit": 0, "um_grad_scale": 1.0},
    "io": {
        "inp_asymmetry": 0.0,
        "out_asymmetry": 0.0,
        "out_noise_std": 0.0,
        "ir_drop": 0.0,
        "out_nonlinearity": 0.0,
        "slope_calibration": 0.0,
        "v_offset_std": 0.0,
        "v_offset_w_min": -1.0,
        "r_series": 0.0,
        "w_read_asymmetry_dtod": 0.0,
    },
}


def check_support(config: SingleRPUConfig) -> None:
    """Check that the mean-field tile can simulate an aihwkit configuration.

    Raises:
        UsageError: if only aihwkit's own tiles can. The message names the first such setting.
    """
    if not isinstance(config.device, SUPPORTED_DEVICES):
        raise _unsupported(type(config.device).__name__)
    _check(config.device, _OFF["device"], {})
    _check(config.device.drift, {"nu": 0.0}, {})
    _check(config.update, _OFF["update"], _CHOICES)
    for io in (config.forward, config.backward):
        if not io.is_perfect:
            _check(io, _OFF["io"], _CHOICES)


def _check(section: Any, off: Mapping[str, Any], choices: Mapping[str, tuple[Any, ...]]) -> None:
    for name, value in off.items():
        if getattr(section, name, value) != value:
            raise _unsupported(f"{type(section).__name__}.{name}={getattr(section, name)}")
    for name, allowed in choices.items():
        if getattr(section, name, allowed[0]) not in allowed:
            raise _unsupported(f"{type(section).__name__}.{name}={getattr(section, name)}")


def _unsupported(what: str) -> UsageError:
    return UsageError(f"the mean-field tile does not simulate {what}: choose backend='aihwkit'")
