"""This module holds training algorithms for analog layers, which say how gradients become pulses.

Without one of these, a layer trains by analog SGD: the gradients of a mini-batch send pulses to the weights themselves.
"""

from copy import deepcopy
from typing import Any, Literal

from aihwkit.simulator import presets
from aihwkit.simulator.configs import (
    DigitalRankUpdateRPUConfig,
    IOParameters,
    UnitCellRPUConfig,
    UpdateParameters,
)
from aihwkit.simulator.configs.compounds import (
    BufferedTransferCompound,
    ChoppedTransferCompound,
    DynamicTransferCompound,
    MixedPrecisionCompound,
    TransferCompound,
)
from aihwkit.simulator.configs.devices import PulsedDevice
from aihwkit.simulator.parameters.enums import BoundManagementType, NoiseManagementType

from aimc_pl.arguments import check_choice, check_flag, check_number, shown
from aimc_pl.devices.catalogue import AnalogDevice, Backend, ConfiguredDevice, copied_config, described, simulated
from aimc_pl.devices.mean_field import MeanFieldRPUConfig, to_mean_field
from aimc_pl.devices.mean_field.tracking import TrackingCompound
from aimc_pl.errors import UsageError

Material = Literal["ReRamES", "ReRamSB", "Capacitor", "EcRam", "EcRamMO", "Idealized"]


@described
def residual_learning(
    device: AnalogDevice | None = None,
    gamma: float = 0.1,
    transfer_lr: float = 1.0,
    transfer_every: float | list[float] = 1.0,
    n_reads_per_transfer: int = 1,
    digital_buffer: bool = False,
    num_crossbars: int = 2,
) -> AnalogDevice:
    """Residual learning (arXiv 2502.06309): a second crossbar learns what the asymmetry of the first one loses.

    A layer has two crossbars of the same device, W and P, and computes with W + γP. Gradients send pulses to P. From
    time to time a column of P is read, and W moves by lr·β times this column, by pulses; lr is the optimizer's
    learning rate. With γ = 0 this is Tiki-Taka version 1 (Gokmen and Haensch, Front. Neurosci. 2020). With a digital
    buffer it is version 2 (Gokmen, Front. AI 2021), which filters the noise of reading.

    With more crossbars this is multi-tile residual learning (arXiv 2510.02516), for devices of few states. The layer
    computes with W₀ + γW₁ + γ²W₂ + …, gradients send pulses to the last crossbar, and each crossbar is transferred to
    the one before it.

    Args:
        device: the device of all crossbars, of the catalogue and with pulsed updates; ``soft_bounds`` by default.
        gamma: γ, the weight of P in the products. The first source found a large gain from 0 to 0.1, and little change
            from 0.1 to 0.4. The second source takes one over the number of states.
        transfer_lr: β, the rate of transfers in units of the learning rate.
        transfer_every: number of updates from one transfer of the last crossbar to the next. A layer is updated once
            per mini-batch, and under ``schedule="async"`` once per micro-batch. A value below 1 makes several transfers
            in an update. Each of the other crossbars is transferred once while the one after it is transferred as often
            as the layer has outputs. A list has a number for every crossbar that is transferred, that of the last one
            first.
        n_reads_per_transfer: number of columns in a transfer.
        digital_buffer: whether transfers go through a digital buffer. A transfer adds lr·β times a column to it. Where
            it then holds a whole step of the device or more, one pulse goes to W, and one step is subtracted from it.
        num_crossbars: number of crossbars of a layer, 2 or more.

    Raises:
        UsageError: if an argument is out of range, or if the device has no pulsed updates of its own.
    """
    check_number("gamma", gamma, at_least=0, at_most=1)
    check_number("transfer_lr", transfer_lr, above=0)
    periods = transfer_every if isinstance(transfer_every, list) else [transfer_every]
    for period in periods:
        check_number("transfer_every", period, above=0)
    check_number("n_reads_per_transfer", n_reads_per_transfer, at_least=1, whole=True)
    check_flag("digital_buffer", digital_buffer)
    check_number("num_crossbars", num_crossbars, at_least=2, whole=True)
    if isinstance(transfer_every, list) and len(periods) != num_crossbars - 1:
        raise UsageError(
            f"transfer_every needs a number for every transfer between num_crossbars={num_crossbars} crossbars, so "
            f"{num_crossbars - 1}, got {len(periods)}"
        )
    config = _pulsed(device, "residual_learning")
    options: dict[str, Any] = {
        "gamma": gamma,
        "transfer_lr": transfer_lr,
        "transfer_every": periods[0],
        # aihwkit takes one more number, for the crossbar that nothing follows.
        "transfer_every_vec": [*periods, 0.0] if isinstance(transfer_every, list) else [],
        "n_reads_per_transfer": n_reads_per_transfer,
    }
    if not digital_buffer:
        return _of_crossbars(config, TransferCompound(**options), number=num_crossbars)
    # aihwkit multiplies what goes into a buffer by γ.
    options |= {"transfer_lr": transfer_lr / (gamma or 1.0), "forget_buffer": False, "momentum": 0.0}
    one_pulse = UpdateParameters(desired_bl=1, update_bl_management=False, update_management=False)
    return _of_crossbars(config, BufferedTransferCompound(**options), one_pulse, num_crossbars)


@described
def chopped_transfer(
    device: AnalogDevice | None = None,
    chop_prob: float = 0.1,
    fast_lr: float = 0.5,
    transfer_lr: float = 1.0,
    transfer_every: float = 1.0,
) -> AnalogDevice:
    """Tiki-Taka version 2 with choppers (Rasch et al., arXiv 2303.04721) over any pulsed device.

    Gradients send pulses to a crossbar P, with signs that flip from time to time. A column of P is read, the signs are
    undone, and the column is added to a digital buffer, which sends whole pulses to the weights W. What is in P for
    another reason than the gradients, such as an offset, changes its sign in the buffer with every flip, and cancels.

    Args:
        device: the device of both crossbars, of the catalogue and with pulsed updates; ``soft_bounds`` by default.
        chop_prob: the probability that the sign of a column flips after the column has been read. With 0 this is
            Tiki-Taka version 2.
        fast_lr: how strong gradients act on P. With 1, a pulse train has its full length where input and error are the
            largest of the recent past. The optimizer's learning rate acts on transfers only.
        transfer_lr: the rate of transfers in units of the learning rate.
        transfer_every: number of updates from one transfer of a column to the next. A layer is updated once per
            mini-batch, and under ``schedule="async"`` once per micro-batch.

    Raises:
        UsageError: if an argument is out of range, or if the device has no pulsed updates of its own.
    """
    check_number("chop_prob", chop_prob, at_least=0, at_most=1)
    compound = ChoppedTransferCompound(in_chop_prob=chop_prob, **_accumulation(fast_lr, transfer_lr, transfer_every))
    return _of_crossbars(_pulsed(device, "chopped_transfer"), compound)


@described
def dynamic_transfer(
    device: AnalogDevice | None = None,
    chop_prob: float = 0.1,
    fast_lr: float = 0.5,
    transfer_lr: float = 1.0,
    transfer_every: float = 1.0,
) -> AnalogDevice:
    """AGAD (Rasch et al., arXiv 2303.04721) over any pulsed device: choppers, and a reference that follows P.

    It is :func:`chopped_transfer`, except that the buffer receives the difference between P and the running mean of P
    before the last flip, and that signs flip regularly.

    Args:
        device: see :func:`chopped_transfer`.
        chop_prob: the sign of a column flips after every 1/chop_prob reads of the column, rounded up and at least 2.
            The weights begin to move when every column has been read once more than that.
        fast_lr: see :func:`chopped_transfer`.
        transfer_lr: see :func:`chopped_transfer`.
        transfer_every: see :func:`chopped_transfer`.

    Raises:
        UsageError: if an argument is out of range, or if the device has no pulsed updates of its own.
    """
    check_number("chop_prob", chop_prob, above=0, at_most=1)
    compound = DynamicTransferCompound(in_chop_prob=chop_prob, **_accumulation(fast_lr, transfer_lr, transfer_every))
    return _of_crossbars(_pulsed(device, "dynamic_transfer"), compound)


@described
def symmetric_point_tracking(
    device: AnalogDevice | None = None,
    gamma: float = 0.1,
    transfer_lr: float = 1.0,
    transfer_every: float = 1.0,
    chop_prob: float = 0.1,
    tracking_rate: float = 0.1,
) -> AnalogDevice:
    """E-RIDER (arXiv 2602.21321): residual learning that estimates where asymmetry pulls P, and subtracts it.

    The symmetric point of a cross-point is the weight where its steps up and down are equal. Noise pulls P there, and
    residual learning transfers this to W as if it were a gradient. Here a digital Q follows P, gradients move P with
    signs c that flip from time to time, W moves by lr·β·c·(P − Q), and the products see W + γ·c·(P − Q).

    The source gives these formulas, with Q ← (1 − η)·Q + η·P, and flips of c with a probability. It is our choice that
    transfers go column by column, as in :func:`residual_learning`; that every column has a sign of its own, which may
    flip after the column has been read; that W moves before Q does; that Q begins at 0; and so are the defaults. With
    η = 0 and ``chop_prob=0`` this is :func:`residual_learning`.

    Args:
        device: the device of both crossbars, of the catalogue and with pulsed updates; ``soft_bounds`` by default.
        gamma: γ, the weight of P − Q in the products.
        transfer_lr: see :func:`residual_learning`.
        transfer_every: see :func:`residual_learning`.
        chop_prob: the probability that the sign of a column flips after the column has been read.
        tracking_rate: η, the share of a read of P in the new Q.

    Raises:
        UsageError: if an argument is out of range, or if the device has no pulsed updates of its own, or is simulated
            by aihwkit, which has no such algorithm.
    """
    check_number("gamma", gamma, at_least=0, at_most=1)
    _check_transfers(transfer_lr, transfer_every)
    config = _pulsed(device, "symmetric_point_tracking")
    if not isinstance(config, MeanFieldRPUConfig):
        raise UsageError(
            "aihwkit has no symmetric_point_tracking: choose backend='mean_field' or 'bits' for its device"
        )
    compound = TrackingCompound(
        gamma=gamma,
        transfer_lr=transfer_lr,
        transfer_every=transfer_every,
        chop_prob=chop_prob,
        tracking_rate=tracking_rate,
    )
    return _of_crossbars(config, compound)


@described
def tiki_taka(material: Material = "ReRamSB", backend: Backend = "mean_field") -> AnalogDevice:
    """Tiki-Taka version 1: gradients move a fast crossbar, which is transferred to the weights (aihwkit's preset).

    Args:
        material: the material of both crossbars.
        backend: how the device is simulated: ``mean_field``, ``bits`` (pulse trains are drawn) or ``aihwkit``.
    """
    return simulated(_preset("TikiTaka", material), backend)


@described
def tiki_taka_v2(material: Material = "ReRamSB", backend: Backend = "mean_field") -> AnalogDevice:
    """Tiki-Taka version 2: a digital buffer filters what is transferred to the weights (aihwkit's preset).

    Args:
        material: the material of both crossbars.
        backend: see :func:`tiki_taka`.
    """
    return simulated(_preset("TTv2", material), backend)


@described
def chopped_tiki_taka(material: Material = "ReRamSB", backend: Backend = "mean_field") -> AnalogDevice:
    """Tiki-Taka version 2 with choppers, see :func:`chopped_transfer` (aihwkit's preset).

    Args:
        material: the material of both crossbars.
        backend: see :func:`tiki_taka`.
    """
    return simulated(_preset("ChoppedTTv2", material), backend)


@described
def agad(material: Material = "ReRamSB", backend: Backend = "mean_field") -> AnalogDevice:
    """Analog gradient accumulation with dynamic reference, see :func:`dynamic_transfer` (aihwkit's preset).

    Args:
        material: the material of both crossbars.
        backend: see :func:`tiki_taka`.
    """
    return simulated(_preset("AGAD", material), backend)


@described
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
    if isinstance(device, str):
        return ConfiguredDevice(to_mean_field(_preset("MixedPrecision", device)))
    config = _pulsed(device, "mixed_precision")
    compound = MixedPrecisionCompound(device=config.device)
    settings = DigitalRankUpdateRPUConfig(device=compound, **_besides_device(config))
    return ConfiguredDevice(to_mean_field(settings) if isinstance(config, MeanFieldRPUConfig) else settings)


def _preset(algorithm: str, material: str) -> Any:
    if isinstance(material, AnalogDevice):
        raise UsageError(
            f"{algorithm} takes the name of a material, got {shown(material)}: residual_learning, chopped_transfer and "
            "dynamic_transfer take any pulsed device"
        )
    check_choice("material", material, Material)
    return getattr(presets, f"{algorithm}{material}Preset")()


def _pulsed(device: AnalogDevice | None, algorithm: str) -> Any:
    """Return a copy of the configuration of a pulsed device, for the algorithm of this name."""
    config = copied_config(device)
    if not isinstance(getattr(config, "device", None), PulsedDevice):
        kind = type(getattr(config, "device", config)).__name__
        raise UsageError(
            f"{algorithm} needs a pulsed device of one crossbar, got {kind}: choose soft_bounds, for example"
        )
    return config


def _besides_device(config: Any) -> dict[str, Any]:
    """Return the sections of a configuration without the device."""
    return {name: getattr(config, name) for name in ("forward", "backward", "update", "mapping", "pre_post", "runtime")}


def _of_crossbars(
    config: Any, compound: TransferCompound, transfer_update: UpdateParameters | None = None, number: int = 2
) -> AnalogDevice:
    """Return a device with several crossbars of a pulsed device, between which a compound transfers."""
    compound.transfer_update = transfer_update or deepcopy(config.update)
    compound.unit_cell_devices = [deepcopy(config.device) for _ in range(number)]
    compound.transfer_forward = _read(config.forward)
    compound.units_in_mbatch = True
    settings = UnitCellRPUConfig(device=compound, **_besides_device(config))
    is_fast = isinstance(config, MeanFieldRPUConfig)
    return ConfiguredDevice(to_mean_field(settings, config.sample_pulses) if is_fast else settings)


def _accumulation(fast_lr: float, transfer_lr: float, transfer_every: float) -> dict[str, Any]:
    check_number("fast_lr", fast_lr, above=0)
    _check_transfers(transfer_lr, transfer_every)
    return {
        "fast_lr": fast_lr,
        "transfer_lr": transfer_lr,
        "transfer_every": transfer_every,
        "auto_scale": True,
        "forget_buffer": False,
    }


def _check_transfers(transfer_lr: float, transfer_every: float) -> None:
    check_number("transfer_lr", transfer_lr, above=0)
    check_number("transfer_every", transfer_every, above=0)


def _read(forward: IOParameters) -> IOParameters:
    """Return the converters of transfers: those of products, without the managements that aihwkit turns off."""
    read = deepcopy(forward)
    read.noise_management, read.bound_management = NoiseManagementType.NONE, BoundManagementType.NONE
    return read
