"""This module is the catalogue of pulsed devices. Each device is a function of its parameters.

A config file names a function, too: ``class_path: aimc_pl.devices.soft_bounds`` with ``init_args``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from inspect import signature
from math import exp
from typing import Any, Literal

from aihwkit.simulator.configs import (
    ConstantStepDevice,
    ExpStepDevice,
    FloatingPointRPUConfig,
    IOParameters,
    LinearStepDevice,
    PowStepDevice,
    SingleRPUConfig,
    SoftBoundsDevice,
    SoftBoundsReferenceDevice,
    UnitCellRPUConfig,
)
from aihwkit.simulator.configs.devices import PulsedDevice
from aihwkit.simulator.parameters.base import RPUConfigBase

from aimc_pl.arguments import check_choice, check_flag, check_instance, check_number
from aimc_pl.devices.mean_field import MeanFieldRPUConfig, to_mean_field
from aimc_pl.devices.mean_field.quantized import NoisyQuantizedDevice, NoisyQuantizedSimulatorTile


class AnalogDevice(ABC):
    """The hardware of a crossbar: its devices, its converters and its pulse trains."""

    call = ""
    """The call of the catalogue's function that has made the device, or an empty text."""

    def __repr__(self) -> str:
        return (
            self.call or f"{type(self).__name__}({type(getattr(self.rpu_config, 'device', self.rpu_config)).__name__})"
        )

    @property
    @abstractmethod
    def rpu_config(self) -> RPUConfigBase:
        """The configuration with which layers are converted to aihwkit's analog layers."""


class ConfiguredDevice(AnalogDevice):
    """A device given by its configuration, which also selects the tile that simulates the device.

    The functions of this module return this class, because a config file may then name them wherever an
    :class:`AnalogDevice` is expected. They could not return aihwkit's configurations: for these, which are dataclasses,
    jsonargparse accepts only the fields.

    Args:
        rpu_config: an aihwkit configuration or a mean-field one.

    Raises:
        UsageError: if ``rpu_config`` is anything else.
    """

    def __init__(self, rpu_config: RPUConfigBase) -> None:
        check_instance("rpu_config", rpu_config, RPUConfigBase, "a configuration of aihwkit, such as SingleRPUConfig()")
        self._rpu_config = rpu_config

    @property
    def rpu_config(self) -> RPUConfigBase:
        """The configuration with which layers are converted to aihwkit's analog layers."""
        return self._rpu_config


def described[**P](function: Callable[P, AnalogDevice]) -> Callable[P, AnalogDevice]:
    """Make a device's ``repr`` the call of the function that returns it, without arguments at their defaults."""

    @wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> AnalogDevice:
        device = function(*args, **kwargs)
        parameters = signature(function).parameters
        given = signature(function).bind(*args, **kwargs).arguments
        changed = [f"{name}={value!r}" for name, value in given.items() if value != parameters[name].default]
        device.call = f"{function.__name__}({', '.join(changed)})"
        return device

    return make


def copied_config(device: AnalogDevice | None) -> Any:
    """Return a copy of a device's configuration; that of :func:`soft_bounds` if ``device`` is ``None``.

    Raises:
        UsageError: if ``device`` is anything else.
    """
    device = soft_bounds() if device is None else device
    what = "a device such as soft_bounds(), or ConfiguredDevice(...) around a configuration of aihwkit"
    check_instance("device", device, AnalogDevice, what)
    return deepcopy(device.rpu_config)


Backend = Literal["mean_field", "bits", "aihwkit"]
"""How a pulsed device is simulated.

- ``mean_field``: in torch, with updates from the mean and the variance of the numbers of pulses.
- ``bits``: by the same tile, which draws pulse trains and counts their coincidences. Weights then move in whole steps.
- ``aihwkit``: pulse by pulse, by aihwkit's own tiles (on the CPU, or on a GPU if aihwkit has been built for it).
"""


@described
def ideal() -> AnalogDevice:
    """Exact products and exact updates in floating point (runs on aihwkit)."""
    return ConfiguredDevice(FloatingPointRPUConfig())


@described
def constant_step(
    w_max: float = 1.0,
    num_states: int = 1200,
    cycle_to_cycle: float = 0.3,
    device_to_device: float = 0.0,
    perfect_io: bool = False,
    backend: Backend = "mean_field",
) -> AnalogDevice:
    """Pulsed device whose step does not depend on the weight: granular and noisy, but symmetric.

    Args:
        w_max: the weight's range is [−w_max, w_max].
        num_states: number of steps from one bound to the other. The mean step is Δw_min = 2·w_max/num_states.
        cycle_to_cycle: standard deviation of a step, in units of Δw_min.
        device_to_device: relative standard deviation of Δw_min and of the bounds over the cross-points.
        perfect_io: whether forward and backward products are exact, without converters and noise.
        backend: how the device is simulated: ``mean_field``, ``bits`` (pulse trains are drawn) or ``aihwkit``.
    """
    device = ConstantStepDevice(**pulsed("w_max", w_max, num_states, cycle_to_cycle, device_to_device))
    return on_crossbar(device, perfect_io, backend)


@described
def linear_step(
    gamma: float = 0.5,
    w_max: float = 1.0,
    num_states: int = 1200,
    cycle_to_cycle: float = 0.3,
    device_to_device: float = 0.0,
    perfect_io: bool = False,
    backend: Backend = "mean_field",
) -> AnalogDevice:
    """Pulsed device whose step falls linearly with the weight, to a fraction (1 − gamma) at the bound.

    Args:
        gamma: relative decrease of the step from weight 0 to a bound: 0 is a constant step, 1 is soft bounds.
        w_max: the weight's range is [−w_max, w_max].
        num_states: the weight's range divided by Δw_min, the mean step at weight 0: 2·w_max/Δw_min.
        cycle_to_cycle: standard deviation of a step, relative to the step.
        device_to_device: relative standard deviation of Δw_min and of the bounds over the cross-points.
        perfect_io: whether forward and backward products are exact, without converters and noise.
        backend: how the device is simulated: ``mean_field``, ``bits`` (pulse trains are drawn) or ``aihwkit``.
    """
    check_number("gamma", gamma, at_least=0, at_most=1)
    device = LinearStepDevice(
        gamma_up=gamma,
        gamma_down=gamma,
        gamma_up_dtod=0.0,
        gamma_down_dtod=0.0,
        **pulsed("w_max", w_max, num_states, cycle_to_cycle, device_to_device),
    )
    return on_crossbar(device, perfect_io, backend)


@described
def soft_bounds(
    tau: float = 1.0,
    num_states: int = 1200,
    cycle_to_cycle: float = 0.3,
    device_to_device: float = 0.0,
    write_noise: float = 0.0,
    perfect_io: bool = False,
    backend: Backend = "mean_field",
) -> AnalogDevice:
    """The paper's asymmetric linear device: a step up is Δw_min(1 − w/τ), a step down Δw_min(1 + w/τ).

    Args:
        tau: τ, the dynamic range: weights stay in [−τ, τ].
        num_states: the range divided by Δw_min, the mean step at weight 0: 2τ/Δw_min.
        cycle_to_cycle: standard deviation of a step, relative to the step.
        device_to_device: relative standard deviation of Δw_min and of the bounds over the cross-points.
        write_noise: standard deviation of the noise that an update adds to the visible weight, in units of Δw_min.
        perfect_io: whether forward and backward products are exact, without converters and noise.
        backend: how the device is simulated: ``mean_field``, ``bits`` (pulse trains are drawn) or ``aihwkit``.
    """
    check_number("write_noise", write_noise, at_least=0)
    device = SoftBoundsDevice(
        write_noise_std=write_noise, **pulsed("tau", tau, num_states, cycle_to_cycle, device_to_device)
    )
    return on_crossbar(device, perfect_io, backend)


@described
def soft_bounds_reference(
    tau: float = 1.0,
    num_states: int = 1200,
    cycle_to_cycle: float = 0.3,
    device_to_device: float = 0.0,
    write_noise: float = 0.0,
    perfect_io: bool = False,
    backend: Backend = "mean_field",
) -> AnalogDevice:
    """Soft-bounds device whose weight is relative to a reference device, with noise added to the step, not scaling it.

    Args:
        tau: τ, the dynamic range: weights stay in [−τ, τ].
        num_states: the range divided by Δw_min, the mean step at weight 0: 2τ/Δw_min.
        cycle_to_cycle: standard deviation of a step, in units of Δw_min.
        device_to_device: relative standard deviation of Δw_min and of the bounds over the cross-points.
        write_noise: standard deviation of the noise that an update adds to the visible weight, in units of Δw_min.
        perfect_io: whether forward and backward products are exact, without converters and noise.
        backend: how the device is simulated: ``mean_field``, ``bits`` (pulse trains are drawn) or ``aihwkit``.
    """
    check_number("write_noise", write_noise, at_least=0)
    device = SoftBoundsReferenceDevice(
        write_noise_std=write_noise, **pulsed("tau", tau, num_states, cycle_to_cycle, device_to_device)
    )
    return on_crossbar(device, perfect_io, backend)


@described
def exp_step(
    gamma: float = 2.0,
    tau: float = 1.0,
    num_states: int = 1200,
    cycle_to_cycle: float = 0.3,
    device_to_device: float = 0.0,
    write_noise: float = 0.0,
    perfect_io: bool = False,
    backend: Backend = "mean_field",
) -> AnalogDevice:
    """Pulsed device whose steps fall exponentially toward a bound: up(w) = Δw_min(1 − e^(−γ(1−w/τ)))/(1 − e^(−γ)).

    down(w) is up(−w). With γ → 0 these are soft bounds. A larger γ keeps steps alike up to a shorter distance from the
    bound.

    Args:
        gamma: γ, how curved the response is, above 0.
        tau: τ, the dynamic range: weights stay in [−τ, τ].
        num_states: the range divided by Δw_min, the mean step at weight 0: 2τ/Δw_min.
        cycle_to_cycle: standard deviation of a step, relative to the step.
        device_to_device: relative standard deviation of Δw_min and of the bounds over the cross-points.
        write_noise: standard deviation of the noise that an update adds to the visible weight, in units of Δw_min.
        perfect_io: whether forward and backward products are exact, without converters and noise.
        backend: how the device is simulated: ``mean_field``, ``bits`` (pulse trains are drawn) or ``aihwkit``.
    """
    check_number("gamma", gamma, at_least=1e-3, at_most=30)
    check_number("write_noise", write_noise, at_least=0)
    fields = pulsed("tau", tau, num_states, cycle_to_cycle, device_to_device)
    # aihwkit's dw_min is the step far from the bound.
    scale = 1 - exp(-gamma)
    shape: dict[str, Any] = {
        "gamma_up": gamma,
        "gamma_down": gamma,
        "A_up": exp(-gamma),
        "A_down": exp(-gamma),
        "a": 1.0,
        "b": 0.0,
    }
    fields |= {"dw_min": fields["dw_min"] / scale, "write_noise_std": write_noise * scale}
    return on_crossbar(ExpStepDevice(**fields, **shape), perfect_io, backend)


@described
def pow_step(
    gamma: float = 2.0,
    tau: float = 1.0,
    num_states: int = 1200,
    cycle_to_cycle: float = 0.3,
    device_to_device: float = 0.0,
    write_noise: float = 0.0,
    perfect_io: bool = False,
    backend: Backend = "mean_field",
) -> AnalogDevice:
    """Pulsed device whose steps are a power of the distance to a bound: up(w) = Δw_min(1 − w/τ)^γ, down(w) = up(−w).

    Args:
        gamma: γ, the power: 0 is a constant step, 1 is soft bounds.
        tau: τ, the dynamic range: weights stay in [−τ, τ].
        num_states: the range divided by Δw_min, the mean step at weight 0: 2τ/Δw_min.
        cycle_to_cycle: standard deviation of a step, relative to the step.
        device_to_device: relative standard deviation of Δw_min, of the bounds and of γ over the cross-points.
        write_noise: standard deviation of the noise that an update adds to the visible weight, in units of Δw_min.
        perfect_io: whether forward and backward products are exact, without converters and noise.
        backend: how the device is simulated: ``mean_field``, ``bits`` (pulse trains are drawn) or ``aihwkit``.
    """
    check_number("gamma", gamma, at_least=0, at_most=10)
    check_number("write_noise", write_noise, at_least=0)
    fields = pulsed("tau", tau, num_states, cycle_to_cycle, device_to_device)
    # aihwkit's dw_min is the step at the other bound.
    scale = 0.5**gamma
    fields |= {"dw_min": fields["dw_min"] / scale, "write_noise_std": write_noise * scale}
    device = PowStepDevice(pow_gamma=gamma, pow_gamma_dtod=device_to_device, pow_up_down_dtod=0.0, **fields)
    return on_crossbar(device, perfect_io, backend)


@described
def noisy_quantized(std: float = 1e-3, bits: int = 8, w_max: float = 1.0, perfect_io: bool = True) -> AnalogDevice:
    """The idealised model of convergence theory: an exact gradient step, plus Gaussian noise, rounded to b bits.

    W ← round(W − α·Σδᵀx + σξ), to the nearest of 2ᵇ − 1 equally spaced weights around zero. There are no pulses.

    Args:
        std: σ, the standard deviation of the noise that every update adds to every weight.
        bits: b, the number of bits of a weight.
        w_max: the largest weight.
        perfect_io: whether forward and backward products are exact, without converters and noise.
    """
    check_number("std", std, at_least=0)
    check_number("bits", bits, at_least=2, at_most=24, whole=True)
    check_number("w_max", w_max, above=0, at_most=10**9)
    check_flag("perfect_io", perfect_io)
    io = IOParameters(is_perfect=perfect_io), IOParameters(is_perfect=perfect_io)
    device: Any = NoisyQuantizedDevice(std, bits, w_max)  # none of aihwkit's devices
    tile_class = NoisyQuantizedSimulatorTile
    return ConfiguredDevice(
        MeanFieldRPUConfig(device=device, forward=io[0], backward=io[1], simulator_tile_class=tile_class)
    )


def pulsed(
    range_name: str, w_max: float, num_states: int, cycle_to_cycle: float, device_to_device: float
) -> dict[str, Any]:
    """Check and return the fields that all step devices of aihwkit share."""
    # The largest values keep the step within the range of float32.
    check_number(range_name, w_max, above=0, at_most=10**9)
    check_number("num_states", num_states, at_least=2, at_most=10**9, whole=True)
    check_number("cycle_to_cycle", cycle_to_cycle, at_least=0)
    check_number("device_to_device", device_to_device, at_least=0)
    return {
        "w_max": w_max,
        "w_min": -w_max,
        "w_max_dtod": device_to_device,
        "w_min_dtod": device_to_device,
        "dw_min": 2 * w_max / num_states,
        "dw_min_std": cycle_to_cycle,
        "dw_min_dtod": device_to_device,
        "up_down_dtod": 0.0,
    }


def on_crossbar(device: PulsedDevice, perfect_io: bool, backend: Backend) -> AnalogDevice:
    """Return a device on a crossbar with aihwkit's default converters, or with exact products."""
    check_flag("perfect_io", perfect_io)
    config = SingleRPUConfig(device=device)
    if perfect_io:
        config.forward = IOParameters(is_perfect=True)
        config.backward = IOParameters(is_perfect=True)
    return simulated(config, backend)


def simulated(config: SingleRPUConfig | UnitCellRPUConfig, backend: Backend) -> AnalogDevice:
    """Return the device of an aihwkit configuration, simulated by a backend."""
    check_choice("backend", backend, Backend)
    if backend == "aihwkit":
        return ConfiguredDevice(config)
    return ConfiguredDevice(to_mean_field(config, sample_pulses=backend == "bits"))
