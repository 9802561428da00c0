"""This module holds training algorithms for analog layers, which say how gradients become pulses.

Without one of these, a layer trains by analog SGD: the gradients of a mini-batch send pulses to the weights themselves.
"""

from copy import deepcopy
from typing import Any, Literal

from aihwkit.simulator import presets
from aihwkit.simulator.configs import (
    DigitalRankUpdateRPUConfig,
    IOParameters,
    SingleRPUConfig,
    UnitCellRPUConfig,
    UpdateParameters,
)
from aihwkit.simulator.configs.compounds import BufferedTransferCompound, MixedPrecisionCompound, TransferCompound
from aihwkit.simulator.configs.devices import PulsedDevice
from aihwkit.simulator.parameters.enums import BoundManagementType, NoiseManagementType

from aimc_pl.arguments import check_flag, check_number
from aimc_pl.devices.catalogue import AnalogDevice, Backend, ConfiguredDevice, simulated, soft_bounds
from aimc_pl.devices.mean_field import MeanFieldRPUConfig, to_mean_field
from aimc_pl.errors import UsageError

Material = Literal["ReRamES", "ReRamSB", "Capacitor", "EcRam", "EcRamMO", "Idealized"]


def residual_learning(
    device: AnalogDevice | None = None,
    gamma: float = 0.1,
    transfer_lr: float = 1.0,
    transfer_every: float = 1.0,
    n_reads_per_transfer: int = 1,
    digital_buffer: bool = False,
) -> AnalogDevice:
    """Residual learning (arXiv 2502.06309): a second crossbar learns what the asymmetry of the first one loses.

    A layer has two crossbars of the same device, W and P, and computes with W + γP. Gradients send pulses to P. From
    time to time a column of P is read, and W moves by lr·β times this column, by pulses; lr is the optimizer's
    learning rate. With γ = 0 this is Tiki-Taka version 1 (Gokmen and Haensch, Front. Neurosci. 2020). With a digital
    buffer it is version 2 (Gokmen, Front. AI 2021), which filters the noise of reading.

    Args:
        device: the device of both crossbars, of the catalogue and with pulsed updates; ``soft_bounds`` by default.
        gamma: γ, the weight of P in the products. The source found a large gain from 0 to 0.1, and little change from
            0.1 to 0.4.
        transfer_lr: β, the rate of transfers in units of the learning rate.
        transfer_every: number of mini-batches from one transfer to the next. A value below 1 makes several transfers in
            a mini-batch.
        n_reads_per_transfer: number of columns in a transfer.
        digital_buffer: whether transfers go through a digital buffer, which sends whole pulses to W.

    Raises:
        UsageError: if an argument is out of range, or if the device has no pulsed updates of its own.
    """
    check_number("gamma", gamma, at_least=0, at_most=1)
    check_number("transfer_lr", transfer_lr, above=0)
    check_number("transfer_every", transfer_every, above=0)
    check_number("n_reads_per_transfer", n_reads_per_transfer, at_least=1, whole=True)
    check_flag("digital_buffer", digital_buffer)
    config: Any = deepcopy((device or soft_bounds()).rpu_config)
    if not isinstance(config, MeanFieldRPUConfig | SingleRPUConfig) or isinstance(config.device, TransferCompound):
        raise UsageError(
            f"residual_learning needs a pulsed device of one crossbar, got {type(config.device).__name__}: choose "
            "soft_bounds, for example"
        )
    compound = BufferedTransferCompound if digital_buffer else TransferCompound
    one_pulse = UpdateParameters(desired_bl=1, update_bl_management=False, update_management=False)
    settings = UnitCellRPUConfig(
        device=compound(
            unit_cell_devices=[config.device, deepcopy(config.device)],
            gamma=gamma,
            transfer_lr=transfer_lr,
            transfer_every=transfer_every,
            n_reads_per_transfer=n_reads_per_transfer,
            transfer_forward=_read(config.forward),
            transfer_update=one_pulse if digital_buffer else deepcopy(config.update),
        ),
        forward=config.forward,
        backward=config.backward,
        update=config.update,
        mapping=config.mapping,
    )
    is_fast = isinstance(config, MeanFieldRPUConfig)
    return ConfiguredDevice(to_mean_field(settings, config.sample_pulses) if is_fast else settings)


def tiki_taka(material: Material = "ReRamSB", backend: Backend = "mean_field") -> AnalogDevice:
    """Tiki-Taka version 1: gradients move a fast crossbar, which is transferred to the weights (aihwkit's preset).

    Args:
        material: the material of both crossbars.
        backend: how the device is simulated: ``mean_field``, ``bits`` (pulse trains are drawn) or ``aihwkit``.
    """
    return simulated(_preset("TikiTaka", material), backend)


def tiki_taka_v2(material: Material = "ReRamSB") -> AnalogDevice:
    """Tiki-Taka version 2: a digital buffer filters the transfer from the fast to the weight array (runs on aihwkit).

    Args:
        material: the material of both arrays.
    """
    return ConfiguredDevice(_preset("TTv2", material))


def chopped_tiki_taka(material: Material = "ReRamSB") -> AnalogDevice:
    """Tiki-Taka version 2 with choppers, which flip the gradient array's sign to cancel its offset (runs on aihwkit).

    Args:
        material: the material of both arrays.
    """
    return ConfiguredDevice(_preset("ChoppedTTv2", material))


def agad(material: Material = "ReRamSB") -> AnalogDevice:
    """Analog gradient accumulation with dynamic reference (Rasch et al., arXiv 2303.04721) (runs on aihwkit).

    Args:
        material: the material of both arrays.
    """
    return ConfiguredDevice(_preset("AGAD", material))


def mixed_precision(device: AnalogDevice | Material = "ReRamSB") -> AnalogDevice:
    """Mixed precision (Le Gallo et al., Nature Electronics 2018): any torch optimizer trains analog weights.

    Products run on the crossbar. The gradient δᵀx is computed digitally, and the optimizer makes a digital step with
    it. The step is added to a digital residual H. Every cross-point gets as many pulses as its H contains whole steps
    of the device, and these are subtracted from H.

    Args:
        device: the device of the crossbar, of the catalogue and with pulsed updates, or a material of aihwkit's
            presets. On ``backend="aihwkit"`` there is no optimizer: steps are those of SGD.

    Raises:
        UsageError: if the device has no pulsed updates of its own, or if there is no such material.
    """
    if not isinstance(device, AnalogDevice):
        return ConfiguredDevice(to_mean_field(_preset("MixedPrecision", device)))
    config: Any = deepcopy(device.rpu_config)
    if not isinstance(config.device, PulsedDevice):
        raise UsageError(
            f"mixed_precision needs a pulsed device of one crossbar, got {type(config.device).__name__}: "
            "choose soft_bounds, for example"
        )
    settings = DigitalRankUpdateRPUConfig(
        device=MixedPrecisionCompound(device=config.device),
        forward=config.forward,
        backward=config.backward,
        update=config.update,
        mapping=config.mapping,
    )
    return ConfiguredDevice(to_mean_field(settings) if isinstance(config, MeanFieldRPUConfig) else settings)


def _preset(algorithm: str, material: str) -> Any:
    preset = getattr(presets, f"{algorithm}{material}Preset", None)
    if preset is None:
        raise UsageError(f"there is no {algorithm} of material {material!r}: see aihwkit.simulator.presets")
    return preset()


def _read(forward: IOParameters) -> IOParameters:
    """Return the converters of transfers: those of products, without the managements that aihwkit turns off."""
    read = deepcopy(forward)
    read.noise_management, read.bound_management = NoiseManagementType.NONE, BoundManagementType.NONE
    return read
