"""This module computes time, energy and memory of a stage from what it does and from the constants of the hardware.

The formulas hold for one micro-batch. A layer of ``rows × columns`` weights on tiles of T × T takes
``⌈rows/T⌉·⌈columns/T⌉`` tiles, which work at the same time. Its vectors follow one another, and so do the layers of a
stage. The digital work of a layer on tiles runs on these tiles' shares of digital units, all other work of a stage on
one unit. Buffers are read and written while tiles compute: they cost energy, and no time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from aimc_pl.cost.constants import Hardware
from aimc_pl.cost.work import Matrix, Work
from aimc_pl.schedule import MAX_MICROBATCHES, Schedule

PARTS = {
    "crossbars": "crossbars",
    "converters": "converters",
    "digital": "digital units",
    "buffers": "buffers",
    "memory": "off-chip memory",
    "links": "links",
    "static": "static power",
}
"""What energy is spent on: the keys of energies, and how tables name them."""


@dataclass(frozen=True)
class Cost:
    """Time and energy.

    Attributes:
        seconds: the time.
        joules: the energy by what it is spent on, by keys of :data:`PARTS`.
    """

    seconds: float = 0.0
    joules: Mapping[str, float] = field(default_factory=dict)

    @property
    def energy(self) -> float:
        """The energy in joules, over all parts."""
        return sum(self.joules.values())

    def __add__(self, other: "Cost") -> "Cost":
        parts = [part for part in PARTS if part in self.joules or part in other.joules]
        joules = {part: self.joules.get(part, 0.0) + other.joules.get(part, 0.0) for part in parts}
        return Cost(self.seconds + other.seconds, joules)

    def __mul__(self, factor: float) -> "Cost":
        return Cost(self.seconds * factor, {part: energy * factor for part, energy in self.joules.items()})


@dataclass(frozen=True)
class StageCost:
    """The cost of a stage.

    Attributes:
        name: the name of the module with which the stage begins; empty for the first stage.
        num_tiles: the number of tiles that hold its weights.
        forward: the cost of a forward of one micro-batch.
        backward: the cost of a backward of one micro-batch.
        gradient: the part of it that computes gradients of weights digitally, for which no other stage waits.
        update: the cost of the updates from one micro-batch.
        step: the further cost of every update, from however many micro-batches: the optimizer, some transfers.
        resident: the bits of the buffer that digital parameters and the optimizer's numbers take.
        kept: the bits that are kept of a micro-batch from its forward to its backward.
        pending: the bits that are kept of it from its backward to its update: inputs and errors of layers on tiles.
        deferred: the bits that are kept of it until its gradient has been computed, where this is no part of the
            backward: inputs and errors of the other layers with weights.
        sent: the bits that go to the next stage with every forward.
        returned: the bits that come back from it with every backward.
    """

    name: str
    num_tiles: int
    forward: Cost
    backward: Cost
    gradient: Cost
    update: Cost
    step: Cost
    resident: float = 0.0
    kept: float = 0.0
    pending: float = 0.0
    deferred: float = 0.0
    sent: float = 0.0
    returned: float = 0.0


def stage_cost(work: Work, hardware: Hardware, optimizer_states: float = 0) -> StageCost:
    """Return the cost of a stage whose activations all fit into its buffer.

    Args:
        work: what the stage does for one micro-batch.
        hardware: the constants.
        optimizer_states: the numbers that the optimizer keeps for each parameter that learns: 0 for SGD, 1 with
            momentum, 2 for Adam. An update takes 2 FLOP, and 5 for each of these numbers.
    """
    bits, weight_bits = hardware.activation_bits.value, hardware.weight_bits.value
    # In mixed precision the optimizer also learns from the gradients of crossbars.
    written = sum(each.rows * each.columns for each in work.matrices if each.learning.is_digital and _learns(each))
    states = optimizer_states * (work.trained + written)
    resident = (work.parameters + states) * weight_bits
    on_chip = min(1.0, hardware.buffer_capacity.value / resident) if resident else 1.0

    def stored(numbers: float) -> Cost:
        """Return the cost of reading or writing digital parameters where they are kept."""
        amount = numbers * weight_bits
        return _on_chip(on_chip * amount, hardware) + _off_chip((1 - on_chip) * amount, hardware)

    forward = _moved(work.moved, hardware) + stored(work.parameters)
    forward += _digital(work.forward_flops, hardware) + _off_chip(work.batch * bits, hardware)
    backward = _moved(work.moved_back, hardware) + stored(work.parameters_back)
    backward += _digital(work.backward_flops - work.gradient_flops, hardware)
    gradient, deferred = _digital(work.gradient_flops, hardware), work.gradient_numbers
    step = _digital(2 * work.trained + 5 * states, hardware) + stored(2 * (work.trained + states))
    update, pending = Cost(), 0
    for matrix in work.matrices:
        learning = matrix.learning
        forward += _product(matrix, hardware, backward=False) * matrix.vectors
        backward += _product(matrix, hardware, backward=True) * matrix.vectors_back
        backward += _product(matrix, hardware, backward=False) * matrix.vectors_again
        if not _learns(matrix):
            continue
        numbers = matrix.numbers_in + matrix.vectors_learning * matrix.rows
        if learning.is_digital:  # the sum of the gradients changes no weight, so it need not wait
            gradient += _gradient(matrix, hardware)
            deferred += numbers
        else:
            update += _pulses(matrix, hardware)
            pending += numbers
        update += _transfer(matrix, hardware) * (learning.transfers_per_vector * matrix.vectors_learning)
        step += _transfer(matrix, hardware) * learning.transfers_per_call
    return StageCost(
        work.name,
        sum(_tiles(matrix, hardware) * matrix.learning.crossbars for matrix in work.matrices),
        forward,
        backward + gradient,
        gradient,
        update,
        step,
        on_chip * resident,
        work.kept * bits,
        pending * bits,
        deferred * bits,
        work.sent * bits,
        work.returned * bits,
    )


def with_spills(stages: Sequence[StageCost], schedule: Schedule, hardware: Hardware) -> list[StageCost]:
    """Return the costs of stages under a schedule, whose micro-batches in flight may not fit into the buffers.

    The share of the activations that exceeds the buffer is written to off-chip memory in the forward and read from it
    in the backward.
    """
    spilled = []
    for index, stage in enumerate(stages):
        held = memory_bound(stage, schedule, index)
        room = hardware.buffer_capacity.value - stage.resident
        share = max(0.0, 1 - room / held) if held else 0.0
        spill = _off_chip(share * stage.kept, hardware)
        spilled.append(replace(stage, forward=stage.forward + spill, backward=stage.backward + spill))
    return spilled


def memory_bound(stage: StageCost, schedule: Schedule, index: int) -> float:
    """Return the most bits that a stage holds at the same time, whatever the times of the stages.

    These are the activations of the micro-batches in flight. Until an update the stage also holds the inputs and errors
    of those micro-batches of the update whose backward is over. Under ``async`` an update has ``accumulate``
    micro-batches, and under the other schedules all of the mini-batch.
    """
    if schedule.is_async:
        # The pipeline stays full, so more micro-batches than those of a mini-batch may be in flight.
        in_flight = schedule.in_flight(index, MAX_MICROBATCHES)
        last = schedule.accumulate
        return max(
            in_flight * stage.kept + (last - 1) * stage.pending, (in_flight - 1) * stage.kept + last * stage.pending
        )
    in_flight = schedule.in_flight(index)
    others = schedule.num_microbatches - in_flight
    waiting = stage.pending + (stage.deferred if schedule.splits_backward else 0.0)
    return max(in_flight * stage.kept + others * waiting, schedule.num_microbatches * waiting)


def link_cost(bits: float, hardware: Hardware) -> Cost:
    """Return the cost of sending bits to a neighbour. The latency is not in it, because it occupies no link."""
    return Cost(bits / hardware.link_bandwidth.value, {"links": bits * hardware.link_energy.value})


def _tiles(matrix: Matrix, hardware: Hardware) -> int:
    return ceil(matrix.rows / hardware.tile_size.value) * ceil(matrix.columns / hardware.tile_size.value)


def _learns(matrix: Matrix) -> bool:
    return matrix.vectors_learning > 0


def _product(matrix: Matrix, hardware: Hardware, *, backward: bool) -> Cost:
    """Return the cost of the product of a layer with one vector, in a forward or a backward."""
    inputs, outputs = (matrix.rows, matrix.columns) if backward else (matrix.columns, matrix.rows)
    seconds = hardware.backward_time if backward else hardware.forward_time
    per_weight = hardware.backward_energy if backward else hardware.forward_energy
    tiles_in, tiles_out = ceil(inputs / hardware.tile_size.value), ceil(outputs / hardware.tile_size.value)
    weights = inputs * outputs * matrix.learning.crossbars_in_products
    conversions = {
        "crossbars": weights * per_weight.value,
        "converters": inputs * tiles_out * hardware.dac_energy.value + outputs * tiles_in * hardware.adc_energy.value,
    }
    # Tiles that share an output each give a part of it, and a digital unit adds these up.
    sums = _digital(outputs * (tiles_in - 1), hardware, tiles_in * tiles_out)
    return Cost(seconds.value, conversions) + sums + _moved(inputs + outputs, hardware)


def _pulses(matrix: Matrix, hardware: Hardware) -> Cost:
    """Return the cost of the pulsed updates of a layer from all its pairs of an input and an error.

    A digital unit looks for the largest input and the largest error of every pair, which set the pulses.
    """
    numbers = matrix.rows + matrix.columns
    weights = matrix.rows * matrix.columns * matrix.learning.crossbars_in_updates
    pulses = _written(weights, matrix.learning.pulses, hardware)
    search = _digital(numbers, hardware, _tiles(matrix, hardware))
    return (pulses + search + _moved(numbers, hardware)) * matrix.vectors_learning


def _gradient(matrix: Matrix, hardware: Hardware) -> Cost:
    """Return the cost of adding up a layer's gradient digitally, in a buffer that is read and written once."""
    weights = matrix.rows * matrix.columns
    product = _digital(2 * weights * matrix.vectors_learning, hardware, _tiles(matrix, hardware))
    return product + _on_chip(2 * weights * hardware.weight_bits.value, hardware)


def _transfer(matrix: Matrix, hardware: Hardware) -> Cost:
    """Return the cost of a transfer of a layer, which all its tiles make at the same time.

    It writes a column by pulses, which it has read from the crossbar before unless the gradient is digital.
    """
    column = matrix.rows * ceil(matrix.columns / hardware.tile_size.value)
    cost = _written(column, matrix.learning.transfer_pulses, hardware)
    if not matrix.learning.is_digital:
        energies = {
            "crossbars": column * hardware.forward_energy.value,
            "converters": column * hardware.adc_energy.value,
        }
        cost += Cost(hardware.forward_time.value, energies) + _moved(column, hardware)
    if matrix.learning.transfers_are_buffered:  # each number of the column is scaled and added to the buffer's
        cost += _digital(2 * column, hardware, _tiles(matrix, hardware)) + _moved(2 * column, hardware)
    return cost


def _written(weights: int, pulses: int | None, hardware: Hardware) -> Cost:
    """Return the cost of one train of pulses on some weights."""
    length = hardware.managed_pulses.value if pulses is None else pulses
    energy = hardware.update_energy.value + length * hardware.pulse_energy.value
    return Cost(hardware.update_time.value + length * hardware.pulse_time.value, {"crossbars": weights * energy})


def _digital(flops: float, hardware: Hardware, tiles: int | None = None) -> Cost:
    """Return the cost of digital operations on the shares of some tiles in digital units, or by default on one unit."""
    units = 1.0 if tiles is None else tiles / hardware.tiles_per_unit.value
    return Cost(flops / (units * hardware.digital_rate.value), {"digital": flops * hardware.digital_energy.value})


def _moved(numbers: float, hardware: Hardware) -> Cost:
    """Return the cost of reading or writing activations and errors in a buffer."""
    return _on_chip(numbers * hardware.activation_bits.value, hardware)


def _on_chip(bits: float, hardware: Hardware) -> Cost:
    """Return the cost of reading or writing a buffer."""
    return Cost(0.0, {"buffers": bits * hardware.buffer_energy.value})


def _off_chip(bits: float, hardware: Hardware) -> Cost:
    """Return the cost of reading or writing off-chip memory."""
    return Cost(bits / hardware.memory_bandwidth.value, {"memory": bits * hardware.memory_energy.value})
