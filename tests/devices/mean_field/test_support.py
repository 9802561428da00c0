"""These tests check what the mean-field tile simulates, and that it refuses what only aihwkit simulates."""

import pytest
from aihwkit.simulator.configs import ConstantStepDevice, SingleRPUConfig, UnitCellRPUConfig
from aihwkit.simulator.configs.devices import PowStepReferenceDevice, SoftBoundsDevice, VectorUnitCell
from aihwkit.simulator.configs.utils import DriftParameter
from aihwkit.simulator.parameters.enums import AnalogMVType, BoundManagementType, PulseType

from aimc_pl.devices import DEVICES, MeanFieldRPUConfig, ecram, reram_es, soft_bounds, to_mean_field
from aimc_pl.errors import UsageError


def changed(section, name, value):
    config = SingleRPUConfig(device=ConstantStepDevice())
    setattr(getattr(config, section), name, value)
    return config


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (SingleRPUConfig(device=PowStepReferenceDevice()), "PowStepReferenceDevice"),
        (UnitCellRPUConfig(device=VectorUnitCell(unit_cell_devices=[ConstantStepDevice()])), "VectorUnitCell"),
        (SingleRPUConfig(device=SoftBoundsDevice(lifetime=9.0, write_noise_std=1.0)), "lifetime=9.0"),
        (changed("device", "drift", DriftParameter(nu=0.1)), "nu=0.1"),
        (changed("update", "pulse_type", PulseType.DETERMINISTIC_IMPLICIT), "pulse_type"),
        (changed("update", "um_grad_scale", 0.5), "um_grad_scale=0.5"),
        (changed("forward", "ir_drop", 1.0), "ir_drop=1.0"),
        (changed("backward", "mv_type", AnalogMVType.POS_NEG_SEPARATE), "mv_type"),
        (changed("forward", "bound_management", BoundManagementType.SHIFT), "bound_management"),
    ],
)
def test_what_only_aihwkit_simulates_is_refused(config, named):
    with pytest.raises(UsageError, match=rf"does not simulate .*{named}.*backend='aihwkit'"):
        to_mean_field(config)


def test_perfect_products_need_no_converters():
    config = changed("forward", "ir_drop", 1.0)
    config.forward.is_perfect = True
    assert to_mean_field(config).forward.is_perfect


def test_backends():
    assert isinstance(soft_bounds().rpu_config, MeanFieldRPUConfig)
    assert not soft_bounds().rpu_config.sample_pulses
    assert soft_bounds(backend="bits").rpu_config.sample_pulses
    assert type(soft_bounds(backend="aihwkit").rpu_config) is SingleRPUConfig
    assert type(ecram(backend="aihwkit").rpu_config).__name__ == "EcRamPreset"
    with pytest.raises(UsageError, match="unknown backend 'exact': choose one of mean_field, bits, aihwkit"):
        soft_bounds(backend="exact")


def test_devices_on_aihwkit_say_so():
    for name, make in DEVICES.items():
        on_aihwkit = not isinstance(make().rpu_config, MeanFieldRPUConfig)
        assert on_aihwkit == ("(runs on aihwkit)" in make.__doc__), name


def test_a_preset_keeps_its_sections():
    preset = reram_es(backend="aihwkit").rpu_config
    config = reram_es().rpu_config
    for section in ("device", "forward", "backward", "update", "mapping"):
        assert getattr(config, section) == getattr(preset, section)
        assert getattr(config, section) is not getattr(preset, section)
