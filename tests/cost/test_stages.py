"""These tests recompute numbers that papers print, and compare costs with closed forms."""

from dataclasses import replace

import pytest
from aihwkit.simulator.configs import DigitalRankUpdateRPUConfig, UnitCellRPUConfig, VectorUnitCellUpdatePolicy
from aihwkit.simulator.configs.compounds import (
    MixedPrecisionCompound,
    OneSidedUnitCell,
    ReferenceUnitCell,
    VectorUnitCell,
)
from aihwkit.simulator.configs.devices import SoftBoundsDevice
from matrices import trained
from torch import nn, randn

from aimc_pl.cost import (
    PRESETS,
    RASCH_2024,
    Learning,
    Matrix,
    Quantity,
    Work,
    count_work,
    stage_cost,
)
from aimc_pl.cost.estimate import stage_times
from aimc_pl.cost.learning import learning_of
from aimc_pl.cost.simulation import simulate
from aimc_pl.cost.stages import Cost, memory_bound, with_spills
from aimc_pl.devices import chopped_transfer, convert_to_analog, residual_learning, symmetric_point_tracking
from aimc_pl.errors import UsageError
from aimc_pl.schedule import Schedule


def cost_of(hardware=RASCH_2024, **matrix):
    size = {"rows": 512, "columns": 512, "vectors": 1, "numbers_in": 512, **matrix}
    return stage_cost(Work(matrices=[trained(**size)]), hardware)


@pytest.mark.parametrize("hardware", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize(("rows", "columns", "vectors"), [(3, 5, 1), (1000, 600, 7), (128, 2049, 3)])
def test_products_and_pulses_are_the_closed_forms(hardware, rows, columns, vectors):
    cost = cost_of(hardware, rows=rows, columns=columns, vectors=vectors)
    value = {name: quantity.value for name, _, _, quantity in hardware.rows()}
    size = value["tile_size"]
    across, down = -(-columns // size), -(-rows // size)
    tiles, share = across * down, value["digital_rate"] / value["tiles_per_unit"]
    assert cost.num_tiles == tiles
    adds = vectors * rows * (across - 1)
    forward = vectors * value["forward_time"] + adds / (tiles * share)
    assert cost.forward.seconds == pytest.approx(forward)
    assert cost.forward.joules["digital"] == pytest.approx(adds * value["digital_energy"])
    conversions = columns * down * value["dac_energy"] + rows * across * value["adc_energy"]
    assert cost.forward.joules["converters"] == pytest.approx(vectors * conversions)
    adds = vectors * columns * (down - 1)
    backward = vectors * value["backward_time"] + adds / (tiles * share)
    assert cost.backward.seconds == pytest.approx(backward)
    pulses = value["update_time"] + value["managed_pulses"] * value["pulse_time"]
    assert cost.update.seconds == pytest.approx(vectors * (pulses + (rows + columns) / (tiles * share)))
    written = value["update_energy"] + value["managed_pulses"] * value["pulse_energy"]
    assert cost.update.joules["crossbars"] == pytest.approx(vectors * rows * columns * written)
    bits = vectors * (rows + columns) * value["activation_bits"]
    for each in (cost.forward, cost.backward, cost.update):
        assert each.joules["buffers"] == pytest.approx(bits * value["buffer_energy"])


def test_the_first_layer_returns_no_error():
    cost = stage_cost(Work(matrices=[Matrix("", 512, 512, 1, 512, vectors_learning=1)]), RASCH_2024)
    assert cost.backward == Cost(0.0, cost.backward.joules)
    assert cost.backward.energy == 0
    assert cost.update == cost_of().update


def test_the_length_of_trains_is_the_devices_unless_it_adapts_them():
    fixed = cost_of(learning=Learning(pulses=31)).update.seconds
    assert fixed - cost_of().update.seconds == pytest.approx((31 - 5) * 5e-9)


def test_residual_learning_reads_two_crossbars_at_once():
    network = nn.Sequential(nn.Linear(64, 32, bias=False))
    convert_to_analog(network, "residual_learning")
    (work,) = count_work(network, lambda: network(randn(10, 64)).sum())
    learning = work.matrices[0].learning
    assert learning == Learning(crossbars=2, crossbars_in_products=2, transfers_per_call=1.0)
    one, two = cost_of(learning=Learning()), cost_of(learning=learning)
    assert two.forward.seconds == one.forward.seconds
    assert two.forward.joules["crossbars"] == 2 * one.forward.joules["crossbars"]
    assert (one.num_tiles, two.num_tiles) == (1, 2)
    # A transfer reads a column and writes it by pulses, once for every update.
    assert (two.update.seconds, two.update.energy) == (one.update.seconds, one.update.energy)
    assert two.step.seconds == pytest.approx(40e-9 + 5 * 5e-9)


@pytest.mark.parametrize(("gammas", "seen"), [([], 2), ([0.0, 1.0], 1), ([0.3, 1.0], 2)])
def test_products_read_the_crossbars_that_they_see(gammas, seen):
    config = residual_learning().rpu_config
    config.device.gamma_vec = gammas
    assert learning_of(config, 64, 10).crossbars_in_products == seen


def test_transfers_between_several_crossbars_add_up():
    device = residual_learning(num_crossbars=4, transfer_every=[1.0, 4.0, 5.0])
    learning = learning_of(device.rpu_config, 64, 10)
    assert learning == Learning(crossbars=4, crossbars_in_products=4, transfers_per_call=1 + 1 / 4 + 1 / 5)
    rarely = learning_of(residual_learning(num_crossbars=4).rpu_config, 64, 10)
    assert rarely.transfers_per_call == 1.0


@pytest.mark.parametrize(
    ("cell", "read", "pulsed"),
    [
        (OneSidedUnitCell(unit_cell_devices=[SoftBoundsDevice()]), 2, 1),
        (ReferenceUnitCell(unit_cell_devices=[SoftBoundsDevice()]), 2, 1),
        (VectorUnitCell(unit_cell_devices=[SoftBoundsDevice()] * 3), 3, 3),
        (VectorUnitCell(unit_cell_devices=[SoftBoundsDevice()] * 3, gamma_vec=[1.0, 0.0, 0.1]), 2, 3),
        (VectorUnitCell([SoftBoundsDevice()] * 3, update_policy=VectorUnitCellUpdatePolicy.SINGLE_RANDOM), 3, 1),
    ],
)
def test_cells_of_several_devices_take_a_crossbar_each(cell, read, pulsed):
    crossbars = max(2, len(cell.unit_cell_devices))
    learning = learning_of(UnitCellRPUConfig(device=cell), 64, 10)
    assert learning == Learning(None, crossbars, read, pulsed)
    one, several = cost_of(), cost_of(learning=learning)
    assert several.num_tiles == crossbars * one.num_tiles
    assert several.forward.joules["crossbars"] == pytest.approx(read * one.forward.joules["crossbars"])
    assert several.update.joules["crossbars"] == pytest.approx(pulsed * one.update.joules["crossbars"])
    assert several.update.seconds == one.update.seconds
    mixed = DigitalRankUpdateRPUConfig(device=MixedPrecisionCompound(device=cell, transfer_every=5))
    programmed = learning_of(mixed, 64, 10)
    assert (programmed.crossbars, programmed.crossbars_in_products, programmed.is_digital) == (crossbars, read, True)


def test_tracking_transfers_through_digital_numbers_and_products_with_these_are_refused():
    hidden = learning_of(symmetric_point_tracking(gamma=0.0, transfer_every=2.0).rpu_config, 64, 10)
    assert hidden == learning_of(chopped_transfer(transfer_every=2.0).rpu_config, 64, 10)
    assert hidden == Learning(crossbars=2, transfers_per_call=0.5, transfers_are_buffered=True)
    with pytest.raises(UsageError, match=r"the cost of products with .* is unknown.* set gamma=0"):
        learning_of(symmetric_point_tracking().rpu_config, 64, 10)


@pytest.mark.parametrize("states", [0, 1, 2])
def test_digital_work(states):
    work = Work(
        forward_flops=7e6,
        backward_flops=9e6,
        gradient_flops=4e6,
        gradient_numbers=30,
        moved=3000,
        moved_back=5000,
        parameters=100,
        parameters_back=70,
        trained=60,
        batch=50,
        kept=20,
        sent=10,
    )
    cost = stage_cost(work, RASCH_2024, states)
    memory = RASCH_2024.memory_bandwidth.value
    assert cost.forward.seconds == pytest.approx(7e6 / 0.7e12 + 50 * 8 / memory)
    assert cost.backward.seconds == pytest.approx(9e6 / 0.7e12)
    assert (cost.gradient.seconds, cost.deferred) == (pytest.approx(4e6 / 0.7e12), 30 * 8)
    assert cost.step.seconds == pytest.approx(60 * (2 + 5 * states) / 0.7e12)
    assert (cost.kept, cost.sent, cost.resident) == (20 * 8, 10 * 8, 32 * (100 + 60 * states))
    for bits, part in (
        (3000 * 8 + 100 * 32, cost.forward),
        (5000 * 8 + 70 * 32, cost.backward),
        (2 * 60 * (1 + states) * 32, cost.step),
    ):
        assert part.joules["buffers"] == pytest.approx(bits * 20.45e-12 / 256)


def test_parameters_that_exceed_the_buffer_live_off_chip():
    small = replace(RASCH_2024, buffer_capacity=Quantity(1000, "bit", "test"))
    cost = stage_cost(Work(parameters=125, trained=125), small)  # 4,000 bits, a quarter of which fits
    assert cost.resident == pytest.approx(1000)
    assert cost.forward.joules["memory"] == pytest.approx(3000 * RASCH_2024.memory_energy.value)
    assert cost.forward.seconds == pytest.approx(3000 / RASCH_2024.memory_bandwidth.value)
    assert cost.step.joules["memory"] == pytest.approx(6000 * RASCH_2024.memory_energy.value)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("num_microbatches", [1, 2, 5])
@pytest.mark.parametrize("kept", [10, 1000])
def test_a_simulation_holds_as_much_as_the_bound_under_async(size, num_microbatches, kept):
    """Check mini-batches of 1 and 4 micro-batches, with updates from one micro-batch and from several."""
    schedule = Schedule("async", 3, size).accumulating(num_microbatches)
    stage = stage_cost(Work(kept=kept, matrices=[trained(30, 20, 1, 20)], gradient_numbers=25), RASCH_2024)
    simulated = simulate(schedule, stage_times([stage] * 3, RASCH_2024), num_minibatches=40)
    assert simulated.peaks == pytest.approx([memory_bound(stage, schedule, index) for index in range(3)])


@pytest.mark.parametrize(
    ("schedule", "held"),
    [
        ("none", [8, 8, 8]),
        ("sync", [8, 8, 8]),
        ("1f1b", [3 + 0.5 * 5, 2 + 0.5 * 6, 1 + 0.5 * 7]),
        ("zero_bubble", [3 + 0.75 * 5, 2 + 0.75 * 6, 1 + 0.75 * 7]),
        ("async", [3, 2, 1]),
    ],
)
def test_what_exceeds_the_buffer_is_spilled(schedule, held):
    # Inputs and errors make half of what is kept on crossbars, and a quarter in digital layers.
    work = Work(kept=100, matrices=[trained(30, 20, 1, 20)], gradient_numbers=25)
    table = Schedule(schedule, 3, 8)
    stage = stage_cost(work, RASCH_2024)
    assert [memory_bound(stage, table, index) for index in range(3)] == pytest.approx([800 * n for n in held])
    small = replace(RASCH_2024, buffer_capacity=Quantity(1600, "bit", "test"))
    for index, spilled in enumerate(with_spills([stage] * 3, table, small)):
        bits = 800 * max(0.0, 1 - 2 / held[index])
        for before, after in ((stage.forward, spilled.forward), (stage.backward, spilled.backward)):
            assert after.seconds - before.seconds == pytest.approx(bits / small.memory_bandwidth.value)
            assert after.energy - before.energy == pytest.approx(bits * small.memory_energy.value)
