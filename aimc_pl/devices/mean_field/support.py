"""This module selects the mean-field tile that simulates an aihwkit configuration, or says why none can."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from aihwkit.simulator.configs import DigitalRankUpdateRPUConfig, SingleRPUConfig, UnitCellRPUConfig
from aihwkit.simulator.configs.compounds import (
    BufferedTransferCompound,
    ChoppedTransferCompound,
    DynamicTransferCompound,
    MixedPrecisionCompound,
    OneSidedUnitCell,
    TransferCompound,
)
from aihwkit.simulator.parameters.enums import AnalogMVType, BoundManagementType, NoiseManagementType, PulseType

from aimc_pl.arguments import check_instance, check_number
from aimc_pl.devices.mean_field.chopped import ChoppedTransferSimulatorTile, DynamicTransferSimulatorTile
from aimc_pl.devices.mean_field.mixed_precision import MixedPrecisionSimulatorTile, MixedPrecisionTile
from aimc_pl.devices.mean_field.one_sided import OneSidedSimulatorTile
from aimc_pl.devices.mean_field.response import SUPPORTED_DEVICES
from aimc_pl.devices.mean_field.tile import MeanFieldRPUConfig, MeanFieldSimulatorTile, MeanFieldTile
from aimc_pl.devices.mean_field.tracking import TrackingCompound, TrackingSimulatorTile
from aimc_pl.devices.mean_field.transfer import BufferedTransferSimulatorTile, TransferSimulatorTile
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
        "count_pulses": False,
    },
    "compound": {"transfer_columns": True, "with_reset_prob": 0.0},
    "chopped": {"n_reads_per_transfer": 1, "random_selection": False},
    "dynamic": {"out_chop_prob": 0.0, "no_buffer": False},
    "mixed precision": {
        "construction_seed": 0,
        "transfer_every": 1,
        "n_rows_per_transfer": -1,
        "granularity": 0.0,
        "transfer_lr": 1.0,
        "n_x_bins": 0,
        "n_d_bins": 0,
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
_COMPOUNDS: dict[type, type[MeanFieldSimulatorTile]] = {
    TransferCompound: TransferSimulatorTile,
    BufferedTransferCompound: BufferedTransferSimulatorTile,
    ChoppedTransferCompound: ChoppedTransferSimulatorTile,
    DynamicTransferCompound: DynamicTransferSimulatorTile,
    TrackingCompound: TrackingSimulatorTile,
}
"""The tiles that transfer between several crossbars."""

_SHARED = ("device", "forward", "backward", "update", "mapping", "pre_post", "runtime")
"""The sections that the configuration of a mean-field tile shares with aihwkit's."""


_Config = SingleRPUConfig | UnitCellRPUConfig | DigitalRankUpdateRPUConfig


def to_mean_field(config: _Config, sample_pulses: bool = False) -> MeanFieldRPUConfig:
    """Return the configuration of a mean-field tile for the same crossbar, or the same compound of crossbars.

    Args:
        config: aihwkit's configuration of a pulsed device, of a pair of one-sided devices, or of a compound for
            Tiki-Taka version 1 or 2 or for mixed precision.
        sample_pulses: see :class:`MeanFieldRPUConfig`.

    Raises:
        UsageError: if the mean-field tile cannot simulate the configuration.
    """
    check_support(config)
    shared = {name: deepcopy(getattr(config, name)) for name in _SHARED}
    device = shared["device"]
    if isinstance(device, TransferCompound):
        # aihwkit's transfers read without these two, whatever the configuration says.
        device.transfer_forward.noise_management = NoiseManagementType.NONE
        device.transfer_forward.bound_management = BoundManagementType.NONE
    is_mixed = isinstance(device, MixedPrecisionCompound)
    inner = _COMPOUNDS.get(type(device), MeanFieldSimulatorTile)
    if is_mixed:
        inner = MixedPrecisionSimulatorTile
    elif isinstance(device, OneSidedUnitCell):
        inner = OneSidedSimulatorTile
    return MeanFieldRPUConfig(
        **shared,
        sample_pulses=sample_pulses,
        tile_class=MixedPrecisionTile if is_mixed else MeanFieldTile,
        simulator_tile_class=inner,
    )


def check_support(config: _Config) -> None:
    """Check that the mean-field tile can simulate an aihwkit configuration.

    Raises:
        UsageError: if only aihwkit's own tiles can. The message names the first such setting.
    """
    check_instance("config", config, _Config, "aihwkit's configuration of a pulsed device, such as SingleRPUConfig()")
    device: Any = config.device
    devices, updates, ios = [device], [config.update], [config.forward, config.backward]
    if type(device) in _COMPOUNDS:
        devices, updates, ios = (
            device.unit_cell_devices,
            [*updates, device.transfer_update],
            [*ios, device.transfer_forward],
        )
        _check(device, _OFF["compound"], {})
        if isinstance(device, ChoppedTransferCompound):
            _check_choppers(device)
        if isinstance(device, TrackingCompound):
            _check_tracking(device)
    if isinstance(device, OneSidedUnitCell):
        devices, updates, ios = (
            device.unit_cell_devices,
            [*updates, device.refresh_update],
            [*ios, device.refresh_forward],
        )
        _check_one_sided(device)
    if isinstance(device, MixedPrecisionCompound):
        devices = [device.device]
        _check(device, _OFF["mixed precision"], {})
    for one in devices:
        if not isinstance(one, SUPPORTED_DEVICES):
            raise _unsupported(type(one).__name__)
        _check(one, _OFF["device"], {})
        if getattr(one, "write_noise_std", 0.0) > 0:
            _check(one, {"lifetime": 0.0}, {})
        _check(one.drift, {"nu": 0.0}, {})
    for update in updates:
        _check(update, _OFF["update"], _CHOICES)
    for io in ios:
        if not io.is_perfect:
            _check(io, _OFF["io"], _CHOICES)


def _check_choppers(compound: ChoppedTransferCompound) -> None:
    _check(compound, _OFF["chopped"], {})
    if compound.transfer_every < 0:
        raise _unsupported(f"transfer_every={compound.transfer_every}")
    if compound.auto_scale and not 0 < compound.auto_momentum < 1:
        raise UsageError(f"auto_momentum must be between 0 and 1, got {compound.auto_momentum}")
    if isinstance(compound, DynamicTransferCompound):
        _check(compound, _OFF["dynamic"], {})
        if compound.in_chop_prob <= 0:
            raise UsageError(f"in_chop_prob must be above 0, got {compound.in_chop_prob}")


def _check_tracking(compound: TrackingCompound) -> None:
    check_number("chop_prob", compound.chop_prob, at_least=0, at_most=1)
    check_number("tracking_rate", compound.tracking_rate, at_least=0, at_most=1)
    if len(compound.unit_cell_devices) != 2:
        raise UsageError(f"a TrackingCompound has two crossbars, got {len(compound.unit_cell_devices)}")


def _check_one_sided(cell: OneSidedUnitCell) -> None:
    devices = cell.unit_cell_devices
    if len(devices) not in (1, 2) or devices[0] != devices[-1]:
        given = ", ".join(type(device).__name__ for device in devices) or "none"
        raise UsageError(f"a OneSidedUnitCell needs one device, or two equal ones, got {given}")
    check_number("refresh_every", cell.refresh_every, at_least=0, whole=True)
    for name in ("refresh_lower_thres", "refresh_upper_thres"):
        check_number(name, getattr(cell, name), at_least=0, at_most=1)
    if cell.refresh_every > 0:
        check_number("w_max of a OneSidedUnitCell's device", devices[0].w_max, above=0)
        # aihwkit's devices with write noise cannot be reset.
        _check(devices[0], {"write_noise_std": 0.0}, {})


def _check(section: Any, off: Mapping[str, Any], choices: Mapping[str, tuple[Any, ...]]) -> None:
    for name, value in off.items():
        if getattr(section, name, value) != value:
            raise _unsupported(f"{type(section).__name__}.{name}={getattr(section, name)}")
    for name, allowed in choices.items():
        if getattr(section, name, allowed[0]) not in allowed:
            raise _unsupported(f"{type(section).__name__}.{name}={getattr(section, name)}")


def _unsupported(what: str) -> UsageError:
    return UsageError(f"the mean-field tile does not simulate {what}: choose backend='aihwkit'")
