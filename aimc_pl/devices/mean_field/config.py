"""The configuration of a mean-field tile: aihwkit's, with a tile of ours."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from aihwkit.simulator.configs import SingleRPUConfig, SoftBoundsReferenceDevice, UpdateParameters
from aihwkit.simulator.configs.devices import PulsedDevice
from aihwkit.simulator.parameters.enums import AnalogMVType, BoundManagementType, NoiseManagementType, PulseType
from aihwkit.simulator.tiles.custom import CustomRPUConfig

from aimc_pl.devices.mean_field.response import SUPPORTED_DEVICES
from aimc_pl.devices.mean_field.tile import MeanFieldSimulatorTile, MeanFieldTile, MeanFieldTileArray
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
_SHARED = ("device", "forward", "backward", "update", "mapping", "pre_post", "runtime")


@dataclass
class MeanFieldRPUConfig(CustomRPUConfig):
    """A crossbar of pulsed devices whose updates are computed from the numbers of pulses, not pulse by pulse."""

    tile_class: type = MeanFieldTile
    simulator_tile_class: type = MeanFieldSimulatorTile
    tile_array_class: type = MeanFieldTileArray

    device: PulsedDevice = field(default_factory=SoftBoundsReferenceDevice)
    """One of aihwkit's step devices, with all its parameters."""

    update: UpdateParameters = field(default_factory=UpdateParameters)  # pyright: ignore[reportIncompatibleVariableOverride]
    """Pulse trains and their management."""

    sample_pulses: bool = False
    """Draw the pulse trains and count their coincidences, instead of taking the counts' mean and variance."""

    def check_support(self) -> None:
        """See that the tile simulates what is configured.

        Raises:
            UsageError: naming what only aihwkit's own tiles simulate.
        """
        if not isinstance(self.device, SUPPORTED_DEVICES):
            raise _unsupported(type(self.device).__name__)
        _check(self.device, _OFF["device"], {})
        _check(self.device.drift, {"nu": 0.0}, {})
        _check(self.update, _OFF["update"], _CHOICES)
        for io in (self.forward, self.backward):
            if not io.is_perfect:
                _check(io, _OFF["io"], _CHOICES)


def to_mean_field(config: SingleRPUConfig, sample_pulses: bool = False) -> MeanFieldRPUConfig:
    """The configuration of a mean-field tile for the same crossbar.

    Args:
        config: a single pulsed device.
        sample_pulses: see :class:`MeanFieldRPUConfig`.

    Raises:
        UsageError: if the tile does not simulate what is configured.
    """
    shared = {name: deepcopy(getattr(config, name)) for name in _SHARED}
    result = MeanFieldRPUConfig(**shared, sample_pulses=sample_pulses)
    result.check_support()
    return result


def _check(section: Any, off: Mapping[str, Any], choices: Mapping[str, tuple[Any, ...]]) -> None:
    for name, value in off.items():
        if getattr(section, name, value) != value:
            raise _unsupported(f"{type(section).__name__}.{name}={getattr(section, name)}")
    for name, allowed in choices.items():
        if getattr(section, name, allowed[0]) not in allowed:
            raise _unsupported(f"{type(section).__name__}.{name}={getattr(section, name)}")


def _unsupported(what: str) -> UsageError:
    return UsageError(f"the mean-field tile does not simulate {what}: choose backend='aihwkit'")
