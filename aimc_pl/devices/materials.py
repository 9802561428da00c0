"""This module holds aihwkit's presets of single devices, most of which were fitted to measured materials."""

from aihwkit.simulator import presets
from aihwkit.simulator.configs import SingleRPUConfig
from aihwkit.simulator.configs.devices import PulsedDevice
from aihwkit.simulator.presets.devices import ReRamArrayHfO2PresetDevice, ReRamArrayOMPresetDevice
from aihwkit.simulator.presets.utils import PresetIOParameters, PresetUpdateParameters

from aimc_pl.devices.catalogue import AnalogDevice, Backend, described, simulated


@described
def ecram(backend: Backend = "mean_field") -> AnalogDevice:
    """Electro-chemical RAM with lithium, fitted to measurements (aihwkit's preset).

    Args:
        backend: how the device is simulated: ``mean_field``, ``bits`` (pulse trains are drawn) or ``aihwkit``.
    """
    return simulated(presets.EcRamPreset(), backend)


@described
def ecram_mo(backend: Backend = "mean_field") -> AnalogDevice:
    """Electro-chemical RAM of metal oxide, fitted to measurements (aihwkit's preset).

    Args:
        backend: how the device is simulated: ``mean_field``, ``bits`` (pulse trains are drawn) or ``aihwkit``.
    """
    return simulated(presets.EcRamMOPreset(), backend)


@described
def capacitor(backend: Backend = "mean_field") -> AnalogDevice:
    """Capacitor that leaks with every update, fitted to measurements (aihwkit's preset).

    A layer is updated once per mini-batch, and under ``schedule="async"`` once per micro-batch.

    Args:
        backend: how the device is simulated: ``mean_field``, ``bits`` (pulse trains are drawn) or ``aihwkit``.
    """
    return simulated(presets.CapacitorPreset(), backend)


@described
def reram_es(backend: Backend = "mean_field") -> AnalogDevice:
    """Resistive RAM with exponential steps, fitted to measurements (aihwkit's preset).

    Args:
        backend: how the device is simulated: ``mean_field``, ``bits`` (pulse trains are drawn) or ``aihwkit``.
    """
    return simulated(presets.ReRamESPreset(), backend)


@described
def reram_sb(backend: Backend = "mean_field") -> AnalogDevice:
    """Resistive RAM with soft bounds, fitted to measurements (aihwkit's preset).

    Args:
        backend: how the device is simulated: ``mean_field``, ``bits`` (pulse trains are drawn) or ``aihwkit``.
    """
    return simulated(presets.ReRamSBPreset(), backend)


@described
def reram_om(backend: Backend = "bits") -> AnalogDevice:
    """Resistive RAM of an optimized material with 21 states, fitted to arrays (aihwkit's preset device).

    Args:
        backend: how the device is simulated. With so few states, ``mean_field`` is less exact than ``bits``.
    """
    return _on_presets_crossbar(ReRamArrayOMPresetDevice(), backend)


@described
def reram_hfo2(backend: Backend = "bits") -> AnalogDevice:
    """Resistive RAM of hafnium oxide with 4 states, fitted to arrays (aihwkit's preset device).

    Args:
        backend: how the device is simulated. With so few states, ``mean_field`` is less exact than ``bits``.
    """
    return _on_presets_crossbar(ReRamArrayHfO2PresetDevice(), backend)


@described
def gokmen_vlasov(backend: Backend = "mean_field") -> AnalogDevice:
    """The RPU baseline of Gokmen and Vlasov, Front. Neurosci. 2016 (aihwkit's preset).

    Args:
        backend: how the device is simulated: ``mean_field``, ``bits`` (pulse trains are drawn) or ``aihwkit``.
    """
    return simulated(presets.GokmenVlasovPreset(), backend)


@described
def idealized(backend: Backend = "mean_field") -> AnalogDevice:
    """The device of Gokmen and Vlasov with 10,000 states and symmetric steps (aihwkit's preset).

    Args:
        backend: how the device is simulated: ``mean_field``, ``bits`` (pulse trains are drawn) or ``aihwkit``.
    """
    return simulated(presets.IdealizedPreset(), backend)


@described
def pcm(backend: Backend = "mean_field") -> AnalogDevice:
    """Pairs of one-sided phase-change devices that are refreshed, fitted to measurements (aihwkit's preset).

    Args:
        backend: how the device is simulated: ``mean_field``, ``bits`` (pulse trains are drawn) or ``aihwkit``.
    """
    return simulated(presets.PCMPreset(), backend)


def _on_presets_crossbar(device: PulsedDevice, backend: Backend) -> AnalogDevice:
    """Return a device with the converters and pulse trains of aihwkit's presets."""
    io = PresetIOParameters(), PresetIOParameters()
    config = SingleRPUConfig(device=device, forward=io[0], backward=io[1], update=PresetUpdateParameters())
    return simulated(config, backend)
