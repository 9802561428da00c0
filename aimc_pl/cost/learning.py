"""This module reads from the configuration of a layer's tiles how the layer learns: pulses, transfers, buffers."""

from dataclasses import dataclass, replace
from typing import Any

from aimc_pl.errors import UsageError


@dataclass(frozen=True)
class Learning:
    """How the crossbars of a layer learn.

    A *call* is one update of the layer from the vectors of some micro-batches: from one under ``async``, from all of a
    mini-batch under the other schedules. A *transfer* reads a column of one crossbar, and writes it to the next one.

    Attributes:
        pulses: the length of a pulse train; ``None`` for the hardware's mean.
        crossbars: the number of crossbars that hold the layer's weights.
        crossbars_in_products: the number of crossbars that a product reads.
        crossbars_in_updates: the number of crossbars that one train of pulses changes.
        transfers_per_vector: the number of transfers for every pair of an input and an error.
        transfers_per_call: the number of transfers for every call.
        transfer_pulses: the length of the pulse train that writes a column; ``None`` for the hardware's mean.
        transfers_are_buffered: whether columns pass through a digital buffer.
        is_digital: whether gradients are added up digitally and then written, column by column, with every call.
    """

    pulses: int | None = None
    crossbars: int = 1
    crossbars_in_products: int = 1
    crossbars_in_updates: int = 1
    transfers_per_vector: float = 0.0
    transfers_per_call: float = 0.0
    transfer_pulses: int | None = None
    transfers_are_buffered: bool = False
    is_digital: bool = False


def learning_of(rpu_config: Any, columns: int, vectors: int) -> Learning:
    """Return how a layer learns with this aihwkit configuration.

    Where transfers pass through more than two crossbars, those from all crossbars count if ``transfer_every_vec`` says
    how often each is transferred. Otherwise only those from the first one count, because the others are rarer by the
    number of outputs. What refreshes a one-sided pair of devices is left out, because it depends on the data.

    Args:
        rpu_config: the configuration of the layer's tiles.
        columns: the number of inputs of a tile.
        vectors: the number of pairs of an input and an error in a micro-batch.

    Raises:
        UsageError: if products see the digital numbers of ``symmetric_point_tracking``.
    """
    from aihwkit.simulator.configs import VectorUnitCellUpdatePolicy
    from aihwkit.simulator.configs.compounds import (
        BufferedTransferCompound,
        ChoppedTransferCompound,
        MixedPrecisionCompound,
        OneSidedUnitCell,
        ReferenceUnitCell,
        TransferCompound,
        VectorUnitCell,
    )

    from aimc_pl.devices.mean_field.tracking import TrackingCompound

    device = getattr(rpu_config, "device", None)
    pulses = _train_length(getattr(rpu_config, "update", None))
    if isinstance(device, MixedPrecisionCompound):
        written = columns * min(1.0, vectors / max(device.transfer_every, 1))
        cell = learning_of(device, columns, vectors)  # a compound also has its cross-points in `device`
        return replace(cell, pulses=pulses, transfers_per_call=written, transfer_pulses=1, is_digital=True)
    if isinstance(device, OneSidedUnitCell | ReferenceUnitCell):
        return Learning(pulses, crossbars=2, crossbars_in_products=2)
    if isinstance(device, VectorUnitCell):
        crossbars = len(device.unit_cell_devices)
        pulsed = crossbars if device.update_policy == VectorUnitCellUpdatePolicy.ALL else 1
        return Learning(pulses, crossbars, sum(map(bool, device.gamma_vec)) or crossbars, pulsed)
    if not isinstance(device, TransferCompound):
        return Learning(pulses)
    crossbars = len(device.unit_cell_devices)
    seen = sum(map(bool, device.gamma_vec)) if any(device.gamma_vec) else crossbars if device.gamma else 1
    if isinstance(device, TrackingCompound) and seen > 1:
        raise UsageError(
            "the cost of products with W + γc(P - Q) is unknown, because Q is digital: set gamma=0 in "
            "symmetric_point_tracking, for the estimate"
        )
    periods = device.transfer_every_vec[:-1] or [device.transfer_every]
    transfers = sum(device.n_reads_per_transfer / period for period in periods if period)
    return Learning(
        pulses,
        crossbars=crossbars,
        crossbars_in_products=seen,
        transfers_per_vector=0.0 if device.units_in_mbatch else transfers,
        transfers_per_call=transfers if device.units_in_mbatch else 0.0,
        transfer_pulses=_train_length(device.transfer_update),
        transfers_are_buffered=isinstance(
            device, BufferedTransferCompound | ChoppedTransferCompound | TrackingCompound
        ),
    )


def _train_length(update: Any) -> int | None:
    """Return the length of the pulse trains of an update; ``None`` if the device adapts it to every vector."""
    return None if update is None or update.update_bl_management else update.desired_bl
