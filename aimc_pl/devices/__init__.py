"""This package holds a catalogue of analog devices, converts networks to them, and draws their responses to pulses."""

from aimc_pl.analog import analog_layers, reset_pending_updates
from aimc_pl.devices.algorithms import (
    agad,
    chopped_tiki_taka,
    chopped_transfer,
    dynamic_transfer,
    mixed_precision,
    residual_learning,
    tiki_taka,
    tiki_taka_v2,
)
from aimc_pl.devices.catalogue import (
    AnalogDevice,
    Backend,
    ConfiguredDevice,
    constant_step,
    exp_step,
    ideal,
    linear_step,
    noisy_quantized,
    pow_step,
    soft_bounds,
    soft_bounds_reference,
)
from aimc_pl.devices.conversion import (
    DeviceSpec,
    convert_to_analog,
    describe_layers,
    describe_slow,
    describe_updates,
    make_analog_aware,
)
from aimc_pl.devices.materials import (
    capacitor,
    ecram,
    ecram_mo,
    gokmen_vlasov,
    idealized,
    pcm,
    reram_es,
    reram_hfo2,
    reram_om,
    reram_sb,
)
from aimc_pl.devices.mean_field import MeanFieldRPUConfig, to_mean_field
from aimc_pl.devices.measured import piecewise_step
from aimc_pl.devices.names import DEVICES, get_device
from aimc_pl.devices.pulse_response import plot_response, pulse_response
from aimc_pl.devices.scaling import weight_scaling

__all__ = [
    "DEVICES",
    "AnalogDevice",
    "Backend",
    "ConfiguredDevice",
    "DeviceSpec",
    "MeanFieldRPUConfig",
    "agad",
    "analog_layers",
    "capacitor",
    "chopped_tiki_taka",
    "chopped_transfer",
    "constant_step",
    "convert_to_analog",
    "describe_layers",
    "describe_slow",
    "describe_updates",
    "dynamic_transfer",
    "ecram",
    "ecram_mo",
    "exp_step",
    "get_device",
    "gokmen_vlasov",
    "ideal",
    "idealized",
    "linear_step",
    "make_analog_aware",
    "mixed_precision",
    "noisy_quantized",
    "pcm",
    "piecewise_step",
    "plot_response",
    "pow_step",
    "pulse_response",
    "reram_es",
    "reram_hfo2",
    "reram_om",
    "reram_sb",
    "reset_pending_updates",
    "residual_learning",
    "soft_bounds",
    "soft_bounds_reference",
    "tiki_taka",
    "tiki_taka_v2",
    "to_mean_field",
    "weight_scaling",
]
